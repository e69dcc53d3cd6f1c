"""The training of a pose model: arguments, task, and the run from start to end."""
