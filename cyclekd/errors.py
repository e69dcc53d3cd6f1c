"""The one error class. Every message says what was asked, what was seen and what to write instead."""


class CycleError(RuntimeError):
    """A model, an argument or a call that cannot be cycled exactly; raised instead of training something else."""
