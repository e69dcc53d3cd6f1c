"""One error class for what a user can cause: a message, no traceback, and exit code 2 from the example scripts."""


class RunError(Exception):
    """A training cannot start or go on; the message says what was asked, what was seen and what to do instead.

    `shared` is true where all processes raise the same, so that one has to say it.
    """

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared
