"""The objective: every cycle's task loss, and each cycle's tokens drawn towards the next cycle's.

The weight of the token term depends wholly on the scale of tokens and task loss. By default it follows both; the
paper's fixed 5e-6 belongs to TokenPose's heat maps and is there as `CycleLoss.paper`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cyclekd.errors import CycleError
from cyclekd.outputs import CycleOutput

SAME = 1e-10
"""A variance below this share of the tokens' mean square is rounding."""

Groups = Mapping[str, tuple[slice, float]]


@dataclass(frozen=True)
class LossParts:
    """Every term of one step's objective, attached to the graph; N cycles have N - 1 pairs of neighbours."""

    total: Tensor
    """The scalar to call backward on."""
    task: Tensor
    """[N], the task loss of each cycle before `cycle_weights`."""
    tokens: Tensor
    """[N - 1], the weighted token term of each pair, summed over the groups."""
    predictions: Tensor
    """[N - 1], the weighted prediction term of each pair."""
    token_mse: dict[str, Tensor] = field(default_factory=dict)
    """Group name to [N - 1]: the plain mean squared distance."""
    alpha: dict[str, Tensor] = field(default_factory=dict)
    """Group name to [N - 1]: the weight that this distance had in the total."""

    def logs(self) -> dict[str, Tensor]:
        """All terms as detached scalars by name (`loss`, `task_1`, `tokens_1_2`, ...); nothing waits for the device."""
        named = {"loss": self.total.detach(), **_by_cycle("task", self.task), **_by_pair("tokens", self.tokens)}
        named |= _by_pair("predictions", self.predictions)
        for group in self.token_mse:
            named |= _by_pair(f"mse_{group}", self.token_mse[group]) | _by_pair(f"alpha_{group}", self.alpha[group])
        return named


class CycleLoss(nn.Module):
    """Sum over cycles of the task loss, plus the distance of each cycle's tokens to the next cycle's.

    Equations (1) to (4) of SDPose (CVPR 2024). `task(output, target)` gets a base output as it is and returns a scalar;
    None takes the loss that the base model computed. The token term of cycle i is one of

        alpha * mse(t_i, t_i+1)                                              a fixed weight, as in the paper
        rho * |task_sum| * mse(t_i, t_i+1) / var(t_i+1)                      the default; weight without gradient

    with `task_sum` the weighted task loss of all cycles and the variance taken over all elements, so that rho does not
    depend on the scale of tokens or loss; tokens that are all alike get no weight. Being a statistic of the batch at
    hand, the second weight differs a little between one large batch and the same batch accumulated in parts; a fixed
    alpha does not. A task loss that crosses zero needs a fixed alpha.

    `groups={"keypoint": (slice(0, 17), 1.0), ...}` names parts of the token axis, each a term of its own with a factor
    to rho or alpha; [B, H, W, C] tokens are flattened to [B, HW, C] for it. Several carried tensors are terms of their
    own. `cycle_weights` weigh the task losses. `prediction_weight` adds the same distance between predictions (a tensor
    output or its `.logits`) with a fixed weight. `detach_teacher=True` stops the gradient into the later cycle: the
    paper's code does not, and with raw tokens and a fixed alpha such a student was seen to diverge.

    Errors: CycleError for bad arguments, a missing base loss, tokens or groups that do not fit each other.
    """

    def __init__(
        self,
        task: Callable[..., Tensor] | None = None,
        *,
        rho: float = 0.3,
        alpha: float | None = None,
        groups: Groups | None = None,
        detach_teacher: bool = False,
        cycle_weights: Sequence[float] | None = None,
        prediction_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if task is not None and not callable(task):
            raise CycleError(
                f"CycleLoss(task={task!r}): task is a function of (output, target), such as F.cross_entropy, "
                "or None for the loss that the model computes itself"
            )
        _check_weights(rho=[rho], alpha=[alpha], prediction_weight=[prediction_weight], cycle_weights=cycle_weights)
        _check_groups(groups or {})
        self.task = task
        self.rho = rho
        self.alpha = alpha
        self.groups = dict(groups) if groups is not None else None
        self.detach_teacher = detach_teacher
        self.cycle_weights = tuple(cycle_weights) if cycle_weights is not None else None
        self.prediction_weight = prediction_weight

    @classmethod
    def paper(cls, task: Callable[..., Tensor] | None = None, **kwargs: Any) -> CycleLoss:
        """The paper's weighting: alpha = 5e-6 on every group, teacher not detached (SDPose, section 4.1.2)."""
        return cls(task, alpha=5e-6, **kwargs)

    def extra_repr(self) -> str:
        weight = f"rho={self.rho}" if self.alpha is None else f"alpha={self.alpha}"
        return f"{weight}, groups={self.groups}, detach_teacher={self.detach_teacher}"

    def forward(self, output: Any, target: Any = None, *, batch_share: Tensor | float = 1.0) -> LossParts:
        """The objective of a `CycleOutput`, or of a bare base output as one cycle.

        `batch_share` is the part of the whole accumulated batch that this call sees, for tasks whose loss is already
        divided by the whole batch (Hugging Face's `num_items_in_batch`); terms with a fixed weight are scaled by it.
        """
        outputs, tokens = (output.outputs, output.tokens) if isinstance(output, CycleOutput) else ((output,), ())
        task = [self._task_loss(each, target) for each in outputs]
        total = task_sum = _sum(
            [weight * loss for weight, loss in zip(self._weights(len(task)), task, strict=True)]
            if self.cycle_weights is not None
            else task
        )
        token_terms, token_mse, alpha = self._token_terms(tokens, task_sum, batch_share)
        prediction_terms = self._prediction_terms(outputs, batch_share)
        for term in [*token_terms, *prediction_terms]:
            total = total + term
        empty = task_sum.new_empty(0)
        return LossParts(
            total=total,
            task=torch.stack(task),
            tokens=torch.stack(token_terms) if token_terms else empty,
            predictions=torch.stack(prediction_terms) if prediction_terms else empty,
            token_mse={name: torch.stack(values) for name, values in token_mse.items()},
            alpha={name: torch.stack(values) for name, values in alpha.items()},
        )

    def _task_loss(self, output: Any, target: Any) -> Tensor:
        if self.task is not None:
            return self.task(output, target)
        loss = base_loss(output)
        if loss is None:
            raise CycleError(
                f"CycleLoss(task=None) takes the loss that the model computes, and {type(output).__name__} holds none: "
                "pass labels to the model, or name the task, as in CycleLoss(F.cross_entropy)"
            )
        return loss

    def _weights(self, cycles: int) -> tuple[float, ...]:
        weights = self.cycle_weights or ()
        if len(weights) < cycles:
            raise CycleError(
                f"CycleLoss(cycle_weights={weights}) has {len(weights)} weights, and the output has {cycles} cycles: "
                "give one per cycle; with fewer cycles, as in evaluation, the first of them are used"
            )
        return weights[:cycles]

    def _token_terms(
        self, tokens: Sequence[Any], task_sum: Tensor, batch_share: Tensor | float
    ) -> tuple[list[Tensor], dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        if (self.rho if self.alpha is None else self.alpha) == 0:
            return [], {}, {}
        terms: list[Tensor] = []
        distances: dict[str, list[Tensor]] = {}
        alphas: dict[str, list[Tensor]] = {}
        for student_tokens, teacher_tokens in pairwise(tokens):
            pair = []
            for name, student, teacher, factor in self._token_groups(student_tokens, teacher_tokens):
                distance = token_mse(student, teacher.detach() if self.detach_teacher else teacher)
                alpha = factor * self._alpha(distance, teacher, task_sum, batch_share)
                pair.append(alpha * distance)
                distances.setdefault(name, []).append(distance)
                alphas.setdefault(name, []).append(alpha)
            terms.append(_sum(pair))
        return terms, distances, alphas

    def _alpha(self, distance: Tensor, teacher: Tensor, task_sum: Tensor, batch_share: Tensor | float) -> Tensor:
        if self.alpha is not None:
            return distance.new_full((), self.alpha) * batch_share
        teacher = _in_fp32(teacher.detach())
        variance, scale = teacher.var(correction=0), teacher.square().mean()
        # The task loss already is this call's share of the whole batch, so the share does not enter here.
        alpha = self.rho * task_sum.detach().abs() / variance
        return torch.where(variance > SAME * scale, alpha, 0.0)  # tokens that are all alike have no scale to follow

    def _token_groups(self, student: Any, teacher: Any) -> list[tuple[str, Tensor, Tensor, float]]:
        """(name, student, teacher, factor) of every term of one pair of cycles."""
        if self.groups is None:
            if isinstance(student, Tensor):
                return [("tokens", student, teacher, 1.0)]
            pairs = zip(student, teacher, strict=True)
            return [(f"tokens{k}", s, t, 1.0) for k, (s, t) in enumerate(pairs)]
        if not isinstance(student, Tensor):
            raise CycleError(
                f"CycleLoss(groups=...) cuts one token tensor, and these blocks carry {len(student)}: leave groups "
                "out; every carried tensor is a term of its own"
            )
        student, teacher = _token_axis(student), _token_axis(teacher)
        return [(name, *_cut(name, part, student, teacher), factor) for name, (part, factor) in self.groups.items()]

    def _prediction_terms(self, outputs: Sequence[Any], batch_share: Tensor | float) -> list[Tensor]:
        if self.prediction_weight == 0:
            return []
        predictions = [_prediction_or_refuse(output) for output in outputs]
        return [
            self.prediction_weight * batch_share * token_mse(p, q.detach() if self.detach_teacher else q)
            for p, q in pairwise(predictions)
        ]


def token_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance between two cycles' tokens of one shape, in fp32 at least; a scalar.

    Equations (1) and (2) of SDPose. A mean over all axes, as in the authors' code, so that the paper's weight 5e-6
    carries over only with this reduction.
    """
    if student.shape != teacher.shape:
        raise CycleError(
            f"the token term compares tokens of one shape, and two neighbouring cycles left {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: name tokens that both have, such as groups={{'keypoint': (slice(0, 17), 1.0)}}, "
            "or leave the term out with rho=0"
        )
    return F.mse_loss(_in_fp32(student), _in_fp32(teacher))


def _in_fp32(tokens: Tensor) -> Tensor:
    return tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens


def base_loss(output: Any) -> Tensor | None:
    """The scalar loss inside a base output (`.loss`, `["loss"]`, or the first of a tuple), or None."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):
        # Hugging Face models put the loss first with return_dict=False.
        loss = output[0] if output and isinstance(output[0], Tensor) and output[0].ndim == 0 else None
    else:
        loss = getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def prediction(output: Any) -> Tensor | None:
    """The prediction inside a base output: the tensor itself, its `.logits`, or None."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def _prediction_or_refuse(output: Any) -> Tensor:
    found = prediction(output)
    if found is None:
        raise CycleError(
            f"CycleLoss(prediction_weight=...) needs a tensor output or one with `.logits`, and the model returned "
            f"{type(output).__name__}: leave prediction_weight at 0 and distil predictions inside `task`"
        )
    return found


def _token_axis(tokens: Tensor) -> Tensor:
    if tokens.ndim < 3:
        raise CycleError(
            f"CycleLoss(groups=...) cuts the token axis of [B, T, D], and these tokens are {tuple(tokens.shape)}: "
            "leave groups out"
        )
    return tokens.flatten(1, -2)


def _cut(name: str, part: slice, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    cut = student[:, part], teacher[:, part]
    if cut[0].shape[1] == 0 or cut[1].shape[1] == 0:
        raise CycleError(
            f"CycleLoss(groups={{{name!r}: ({part}, ...)}}) selects no token: the cycles left {student.shape[1]} and "
            f"{teacher.shape[1]} tokens"
        )
    return cut


def _check_weights(**weights: Sequence[float | None] | None) -> None:
    for name, values in weights.items():
        for value in values or ():
            if value is not None and not _is_weight(value):
                raise CycleError(f"CycleLoss({name}={value!r}): a weight is a finite number of at least 0")


def _check_groups(groups: Groups) -> None:
    for name, group in groups.items():
        pair = isinstance(group, tuple) and len(group) == 2
        if not (pair and isinstance(group[0], slice) and _is_weight(group[1])):
            raise CycleError(f"CycleLoss(groups={{{name!r}: {group!r}}}): a group is (slice, factor of at least 0)")


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < float("inf")


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]  # not sum(), which starts from an int and adds an operation
    for term in terms[1:]:
        total = total + term
    return total


def _by_cycle(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_{i + 1}": value for i, value in enumerate(values.detach().unbind())}


def _by_pair(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_{i + 1}_{i + 2}": value for i, value in enumerate(values.detach().unbind())}
