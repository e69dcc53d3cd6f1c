"""One error class for pose: a message for what a user can cause, which the example scripts show without a traceback."""

from cyclekd.integrations.runs.errors import RunError


class PoseError(RunError):
    """A pose model, file or argument does not fit; the message says what was asked, what was seen and what to write."""
