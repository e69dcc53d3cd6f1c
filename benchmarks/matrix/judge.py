"""What wrapping does to one model: exact, as defined, refused or wrong, against a truth that knows no cyclekd."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.matrix.repeated import Cycle, Truth, all_finite, gradient_error, gradients, leaves, relative_error
from benchmarks.matrix.row import Row
from cyclekd import CycleError, CycleOutput, run_cycles, set_cycles, structure, wrap_multicycle
from cyclekd.stacks import choose_stack, stack_blocks

CYCLES = 3
TOLERANCE = 1e-5
CHECKPOINT_TOLERANCE = 1e-6
VISIBLE = 1e-3
"""Cycles have to differ by this much, or their agreement with the truth would prove nothing."""


@dataclass
class Judgement:
    """One line of the results file; the figures are relative errors, empty where nothing was compared."""

    library: str
    name: str
    task: str = ""
    verdict: str = ""  # exact, defined, refused or wrong; empty where the model could not be evaluated
    reason: str = ""
    model: str = ""
    stack: str = ""
    found: str = ""  # "alone", "example_inputs" where it took a batch, "named" where it had to be chosen
    blocks: int = 0
    truth: str = ""
    evaluation: float | str = ""
    training: float | str = ""
    gradients: float | str = ""
    control: float | str = ""  # smallest difference between two cycles
    losses: str = ""
    checkpointing: str = ""
    hidden_states: str = ""
    cache: str = ""
    seconds: float = 0.0


class Unfit(Exception):
    """The comparison cannot be made; the reason is no fault of the wrapper."""


class OutOfTime(BaseException):
    """The row takes too long; no Exception, so that no library takes it for one of its own."""


class Wrong(Exception):
    """The wrapped model does something else than it promises."""


class Imprecise(Wrong):
    """It differs by so little that it may be rounding."""


def judge(library: str, row: Row) -> Judgement:
    """Every check of one row; CycleErrors become a refusal, all other failures of the wrapped model a wrong."""
    start = time.monotonic()
    result = Judgement(library, row.name, row.task)
    try:
        _judge_precisely(row, result)
    except (Unfit, OutOfTime) as reason:
        result.reason = str(reason)
    except CycleError as refusal:
        result.verdict, result.reason = "refused", str(refusal)
    except Wrong as reason:
        result.verdict, result.reason = "wrong", str(reason)
    result.seconds = round(time.monotonic() - start, 1)
    return result


def _judge_precisely(row: Row, result: Judgement) -> None:
    """In single precision, and in double where that rounds too much to tell."""
    try:
        _judge(row, result)
    except Imprecise as reason:
        try:
            _judge(_in_double(row), result)
        except Unfit as unfit:
            raise Unfit(f"{reason}, and in double precision: {unfit}") from unfit
        precise = f"compared in double precision: in single, {reason}"
        result.reason = f"{result.reason}; {precise}" if result.reason else precise


def _judge(row: Row, result: Judgement) -> None:
    if row.without_stack:
        raise Unfit(f"no stack: {row.without_stack}")
    with _or_unfit("not built"):
        plain = row.build()
        result.model = type(plain).__name__
        for mode in (True, False):
            _seeded_call(plain.train(mode), row)
    with _or_wrong("looking for the stack"):
        result.stack, result.found = _stack(row, plain)
        result.blocks = len(stack_blocks(plain, result.stack))
    with _or_unfit("no truth"):
        truth = _truth(row, result.stack)
    result.truth = row.loop.__name__ if row.loop else "repeated list"
    with _or_wrong("wrapped"):
        wrapped = wrap_multicycle(row.build(), CYCLES, stack=result.stack)
        evaluated = _evaluate(wrapped, row)
        with _or_unfit("no truth"):
            expected = truth.evaluation
        result.control = _control(expected)
        result.evaluation = _output_error(evaluated, expected)
        trained = _train(wrapped, row)
        with _or_unfit("no truth"):
            expected = truth.training
        result.training = _output_error(trained, expected)
        result.gradients = _gradient_error(wrapped, trained, truth)
    _check_control(result, truth)
    for name in ("evaluation", "training", "gradients"):
        error = getattr(result, name)
        if not error <= TOLERANCE:
            raise (Imprecise if error < VISIBLE else Wrong)(f"{name} differ from the {result.truth} by {error:.1e}")
    with _or_wrong("losses"):
        result.losses = _losses(trained)
    for name, check in (("checkpointing", _checkpointing), ("hidden_states", _hidden_states), ("cache", _cache)):
        with _or_wrong(name):
            setattr(result, name, check(row, result.stack, trained))
    result.verdict = "defined" if row.loop else "exact"
    result.reason = f"equal to the loop written by hand: {row.loop.__name__}" if row.loop else ""


# -- the model and the truth about it ----------------------------------------------------------------------------------


def _stack(row: Row, plain: nn.Module) -> tuple[str, str]:
    if row.path:
        return row.path, "named"
    try:
        return choose_stack(plain), "alone"
    except CycleError as refusal:
        if "example_inputs" not in str(refusal):
            raise
    args, kwargs = row.inputs()
    return choose_stack(plain, example_inputs=kwargs if kwargs and not args else args), "example_inputs"


def _truth(row: Row, path: str) -> Truth:
    return Truth(row.build(), path, row.inputs(), _every_tensor, row.lengthen, row.loop, row.last_round)


def _every_tensor(left: Any) -> Any:
    return tuple(tensor for tensor in leaves(left).values() if tensor.is_floating_point())


def _seeded_call(model: nn.Module, row: Row, **more: Any) -> Any:
    torch.manual_seed(0)
    args, kwargs = row.inputs()
    return model(*args, **{**kwargs, **more})


def _evaluate(wrapped: nn.Module, row: Row) -> CycleOutput:
    torch.manual_seed(0)
    args, kwargs = row.inputs()
    with torch.no_grad():
        return run_cycles(wrapped.eval(), *args, cycles=CYCLES, **kwargs)


def _train(wrapped: nn.Module, row: Row, **more: Any) -> CycleOutput:
    set_cycles(wrapped, CYCLES)
    output = _seeded_call(wrapped.train(), row, **more)
    if not isinstance(output, CycleOutput) or len(output.outputs) != CYCLES:
        raise Wrong(f"a training call returned {type(output).__name__}")
    return output


# -- equal, and not for nothing ----------------------------------------------------------------------------------------


def _output_error(found: CycleOutput, expected: list[Cycle]) -> float:
    errors = []
    for output, tokens, cycle in zip(found.outputs, found.tokens, expected, strict=True):
        errors += [relative_error(output, cycle.output), *(error for _, error in _matches(tokens, cycle.tokens))]
    return max(errors)


def _matches(tokens: Any, left: tuple[Tensor, ...]) -> list[tuple[Tensor, float]]:
    """For every carried tensor, the one among those that left the last block which it is, and how far it is off."""
    others, matches = list(left), []
    for tensor in leaves(tokens).values():
        errors = [relative_error(tensor, other) for other in others]
        nearest = min(range(len(others)), key=errors.__getitem__)
        matches.append((others.pop(nearest), errors[nearest]))
    if not matches:
        raise Wrong("no tokens were returned")
    return matches


def _gradient_error(wrapped: nn.Module, found: CycleOutput, truth: Truth) -> float:
    """The worst over all parameters and cycles, measured on the largest gradient of the cycle where one is tiny."""
    errors = [0.0]
    for output, tokens, cycle in zip(found.outputs, found.tokens, truth.training, strict=True):
        ours = gradients(wrapped, (output, tokens))
        theirs = gradients(truth.model, (cycle.output, _as_carried(tokens, cycle.tokens)))
        errors.append(gradient_error(ours, theirs))
    return max(errors)


def _as_carried(tokens: Any, left: tuple[Tensor, ...]) -> Any:
    matching = tuple(match for match, _ in _matches(tokens, left))
    return matching[0] if isinstance(tokens, Tensor) else matching


def _control(cycles: list[Cycle]) -> float:
    return min(relative_error(a.output, b.output) for a, b in combinations(cycles, 2))


def _check_control(result: Judgement, truth: Truth) -> None:
    if not all_finite([truth.evaluation, truth.training]):
        raise Unfit("no control: the repeated model's outputs are not finite")
    if not VISIBLE < result.control:
        raise Unfit(f"no control: its cycles differ by {result.control:.1e} only")
    names = {parameter: name for name, parameter in truth.model.named_parameters()}
    for number, block in enumerate(stack_blocks(truth.model, result.stack)):
        own = [names[p] for p in block.parameters() if p.requires_grad]
        if not any(cycle.gradients[name].any() for cycle in truth.training for name in own):
            raise Unfit(f"no control: block {number} gets no gradient")


def _losses(found: CycleOutput) -> str:
    """Whether every cycle has a loss; the objective is then that of equations (1) to (4), written out."""
    losses = [leaves(output).get(".loss") for output in found.outputs]
    if any(loss is None or loss.numel() > 1 for loss in losses):
        return "none"
    task = sum(losses)
    total = task
    for students, teachers in pairwise(found.tokens):
        for student, teacher in zip(leaves(students).values(), leaves(teachers).values(), strict=True):
            total = total + 0.3 * task.detach().abs() * (student - teacher).square().mean() / teacher.detach().var(
                correction=0
            )
    if not relative_error(found.loss, total) <= TOLERANCE:
        raise Wrong(f"the objective is {found.loss}, and {total} when it is written out")
    return "every cycle"


# -- what users switch on ----------------------------------------------------------------------------------------------


def _checkpointing(row: Row, path: str, found: CycleOutput) -> str:
    """Gradients with activation checkpointing against those without; in double precision where fp32 rounds too much."""
    if not _enable_checkpointing(row.build()):
        return "not supported"
    for precision, checked in (("", row), (" in double precision", _in_double(row))):
        try:
            plain, _ = _checkpointed(checked.build().train(), path, checked, lambda output: output)
        except Exception as error:
            return f"the plain model fails: {_short(error)}"
        wrapped = wrap_multicycle(checked.build(), CYCLES, stack=path).train()
        try:
            distance, recomputed = _checkpointed(wrapped, path, checked, lambda out: (out.outputs, out.tokens))
        except CycleError as refusal:
            return f"refused: {refusal}"
        if distance <= CHECKPOINT_TOLERANCE:
            return f"equal{precision}" if recomputed else "equal, no block recomputed"
        if not plain <= CHECKPOINT_TOLERANCE and precision:
            return f"the plain model's gradients differ by {plain:.1e}"
    raise Wrong(f"gradients differ by {distance:.1e} with checkpointing")


def _checkpointed(model: nn.Module, path: str, row: Row, values: Callable[[Any], Any]) -> tuple[float, bool]:
    """How far the gradients are off when checkpointing is switched on, and whether blocks were called more often."""
    called: list[nn.Module] = []
    insides = {
        module for block in stack_blocks(model, path) for child in block.children() for module in child.modules()
    }
    handles = [module.register_forward_pre_hook(lambda module, args: called.append(module)) for module in insides]
    without = gradients(model, values(_seeded_call(model, row)))
    calls = len(called)
    _enable_checkpointing(model)
    distance = gradient_error(gradients(model, values(_seeded_call(model, row))), without)
    for handle in handles:
        handle.remove()
    return distance, len(called) > 2 * calls


def _in_double(row: Row) -> Row:
    args, kwargs = row.inputs()
    for path, tensor in structure.leaves((args, kwargs)):
        if tensor.is_floating_point():
            args, kwargs = structure.replace((args, kwargs), path, tensor.double())
    return row._replace(make=lambda: row.make().double(), inputs=lambda: (args, kwargs))


def _enable_checkpointing(model: nn.Module) -> bool:
    try:
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
    except Exception:  # each library says in its own way that a model does not support it
        return False
    return True


def _hidden_states(row: Row, path: str, found: CycleOutput) -> str:
    """Each cycle returns as many hidden states as the plain model, and the last one that its repeated list has."""
    plain = row.build()
    if not hasattr(plain, "config"):
        return ""
    try:
        expected = _states(_seeded_call(plain.train(), row, output_hidden_states=True))
    except Exception:
        return "not supported"
    if not expected:
        return "not supported"
    wrapped = wrap_multicycle(row.build(), CYCLES, stack=path)
    for cycle in _train(wrapped, row, output_hidden_states=True).outputs:
        if {name: len(states) for name, states in _states(cycle).items()} != {n: len(s) for n, s in expected.items()}:
            raise Wrong("a cycle returns another number of hidden states than the plain model")
    try:
        longer = _states(_seeded_call(_truth(row, path).longer[-1].train(), row, output_hidden_states=True))
        last = {name: states[-1] for name, states in longer.items()}
    except Exception:  # what longer models collect is their own business, and may not be made for it
        return "as many"
    ours = {name: states[-1] for name, states in _states(cycle).items()}
    return "as many, the last the same" if relative_error(ours, last) <= TOLERANCE else "as many"


def _states(output: Any) -> dict[str, Any]:
    names = [name for name in (output if isinstance(output, dict) else ()) if name.endswith("hidden_states")]
    return {name: output[name] for name in names if isinstance(output[name], (tuple, list))}


def _cache(row: Row, path: str, found: CycleOutput) -> str:
    """With `use_cache=True` the cycles are the same, and a filled cache is refused."""
    if "use_cache" not in row.inputs()[1]:
        return ""
    plain = row.build().eval()
    try:
        with torch.no_grad():
            with_cache, without = (_seeded_call(plain, row, use_cache=use) for use in (True, False))
            cache = next(value for name, value in with_cache.items() if name in CACHES)
    except Exception:
        return "not supported"
    if not all(relative_error(leaves(with_cache).get(at), left) <= TOLERANCE for at, left in leaves(without).items()):
        return "the plain model's outputs differ"
    wrapped = wrap_multicycle(row.build(), CYCLES, stack=path)
    for cycle, expected in zip(_train(wrapped, row, use_cache=True).outputs, found.outputs, strict=True):
        for where, tensor in leaves(expected).items():
            if not relative_error(leaves(cycle).get(where), tensor) <= TOLERANCE:
                raise Wrong(f"{where} of a cycle differs with use_cache=True")
    name = next((name for name in CACHES if name in inspect.signature(plain.forward).parameters), None)
    if name is None:
        return "equal"
    try:
        _train(wrapped, row, use_cache=True, **{name: cache})
    except CycleError:
        return "equal, filled ones refused"
    raise Wrong("a filled cache is taken into several cycles")


CACHES = ("past_key_values", "cache_params", "past_buckets_states")


# -- whose fault it is -------------------------------------------------------------------------------------------------


@contextmanager
def _or_unfit(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Unfit(f"{what}: {_short(error)}") from error


@contextmanager
def _or_wrong(what: str) -> Iterator[None]:
    try:
        yield
    except (CycleError, Unfit, Wrong):
        raise
    except Exception as error:
        raise Wrong(f"{what}: {_short(error)}") from error


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
