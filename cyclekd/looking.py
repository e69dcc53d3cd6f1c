"""One look at what happens between the blocks: whether tokens take other ways than from block to block.

A pass with gradients shows it in the autograd graph. It is made once per model, and only where blocks receive something
that is neither what the block before returned nor what every block receives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cyclekd.errors import CycleError
from cyclekd.slots import autograd_time, depends_on, floating, gradient_nodes, upstream
from cyclekd.structure import Leaf, get


@dataclass
class Look:
    """What entered the stack and what went from block to block, as nodes of the autograd graph."""

    path: str  # of the stack
    entry: Any = None  # (args, kwargs) of the first block call
    sources: set[Any] = field(default_factory=set)  # made what entered
    origins: set[Any] = field(default_factory=set)  # made what that was computed from, and is of its size
    passed: set[Any] = field(default_factory=set)  # made what blocks handed on
    since: int = 0  # when the first block was called
    frozen: list[Tensor] = field(default_factory=list)  # had no gradient, and shall have none afterwards

    def begin(self, entry: Any, entering: list[Any]) -> None:
        """The first block is called; `entering` are those of its arguments that are carried."""
        tokens = [each for each in entering if isinstance(each, Tensor) and each.is_floating_point()]
        self.frozen = [each.requires_grad_() for each in tokens if not each.requires_grad]
        self.entry, self.sources, self.since = entry, gradient_nodes(tokens), autograd_time()
        self.origins = upstream(self.sources, tokens)

    def follow(self, carried: list[Any]) -> None:
        """Another block is called; `carried` left the one before."""
        self.passed |= gradient_nodes(carried)

    def end(self) -> None:
        """Leave the tensors as they were found."""
        for tokens in self.frozen:
            tokens.requires_grad_(False)

    def check_tokens(self, block: str, tokens: list[Any], left: Any, carried: list[Any]) -> None:
        """Where something happens to the tokens, they have to come through the block before, and nowhere else."""
        if not depends_on(tokens, gradient_nodes(left)):
            raise CycleError(
                f"a block of the stack {self.path!r} ({block}) does not receive what the one before it returned, so "
                "that they are no stack but stand side by side: choose another stack=..."
            )
        # A frozen stem has no graph to see a residual stream in; then nothing may pass even the last block by.
        past = gradient_nodes(carried) if self.frozen else self.passed
        if depends_on(tokens, self.sources | self.origins, past, self.since):
            self._refuse_what_passes_by(block)

    def check_beside(self, block: str, fresh: list[Leaf], left: Any, carried: list[Any]) -> None:
        """Where the tokens are handed on, what comes beside them must not hold what a later cycle has to replace."""
        handed_on = gradient_nodes(carried)
        for entry, tensor in fresh:
            if depends_on(tensor, gradient_nodes(left) - handed_on, past=handed_on):
                raise CycleError(
                    f"the blocks of the stack {self.path!r} hand on several tensors, and one of them is changed "
                    f"between two blocks, so that it cannot be told what {block} carries: change it inside the block"
                )
            at_first = get(self.entry, entry)
            if depends_on(tensor, handed_on) and depends_on(at_first, self.sources):
                raise CycleError(
                    f"the blocks of the stack {self.path!r} receive, beside the tokens, something that is computed "
                    f"from them before every block ({block}, argument {entry}), and a later cycle would enter with "
                    "that of the stem's tokens: compute it inside the block"
                )
            # What was computed from the stem's tokens before the first block is the same in every cycle, unless it is
            # mixed with what blocks returned: then it is part of what the loop keeps.
            if depends_on(tensor, self.passed):
                passes_by = depends_on(tensor, self.sources | self.origins, self.passed)
            else:
                passes_by = depends_on(tensor, self.sources, self.passed, self.since)
            if passes_by:
                self._refuse_what_passes_by(block)

    def _refuse_what_passes_by(self, block: str) -> None:
        raise CycleError(
            f"what enters the stack {self.path!r} reaches its later blocks past the first {block} (as in x = x + "
            "block(x)), so that a cycle would only replace a part of it: put the residual inside the block, and list "
            "whole blocks"
        )


def reaches(left: list[Any], output: Any) -> bool:
    """Whether what left a stack is seen to have a part in `output`."""
    return depends_on([tensor for _, tensor in floating(output)], gradient_nodes(left))
