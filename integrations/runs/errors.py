"""One error class for what a user can cause: a message, no traceback, and exit code 2 from the example scripts."""


class RunError(Exception):
    """A training cannot start or go on; the message says what was asked, what was seen and what to do instead."""
