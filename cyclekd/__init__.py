"""Multi-cycle self-distillation for transformers: N passes through the same blocks in training, one in evaluation."""

from cyclekd._version import __version__
from cyclekd.errors import CycleError
from cyclekd.losses import CycleLoss, LossParts
from cyclekd.outputs import CycleOutput
from cyclekd.report import cycle_report
from cyclekd.stacks import find_stacks
from cyclekd.wrap import run_cycles, set_cycles, unwrap_multicycle, wrap_multicycle

__all__ = [
    "CycleError",
    "CycleLoss",
    "CycleOutput",
    "LossParts",
    "__version__",
    "cycle_report",
    "find_stacks",
    "run_cycles",
    "set_cycles",
    "unwrap_multicycle",
    "wrap_multicycle",
]
