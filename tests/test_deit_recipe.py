"""DeiT's recipe number by number, and what its arguments make: model, cycles, loss, optimizer and schedule."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cyclekd import CycleOutput
from cyclekd.integrations.deit.arguments import FIRST_LOOK, check_arguments
from cyclekd.integrations.deit.recipe import (
    RECIPE_BATCH,
    add_cycles,
    augment_settings,
    build_criterion,
    build_mixup,
    build_model,
    build_optimizer,
    build_schedule,
    load_weights,
    lr_warning,
    scaled_lr,
    token_groups,
)
from cyclekd.integrations.deit.train import parse_arguments
from cyclekd.integrations.runs.errors import RunError

RECIPE = {
    "model": "deit_tiny_patch16_224",
    "model_args": {},
    "epochs": 300,
    "batch_size": 256,
    "lr": 5e-4,
    "weight_decay": 0.05,
    "warmup_epochs": 5,
    "clip_grad": None,
    "ema": None,
    "smoothing": 0.1,
    "drop_path": 0.1,
    "input_size": 224,
    "crop": "random-resized",
    "scale": (0.08, 1),
    "hflip": 0.5,
    "rand_augment": "rand-m9-n2-mstd0.5-inc1",
    "erase": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_switch": 0.5,
    "repeated_augmentation": 3,
    "crop_pct": 0.875,
}
"""DeiT (arXiv:2012.12877), table 9, its released code and its hyper-parameters for DeiT-Tiny."""

SIZE = {"img_size": 8, "patch_size": 4, "depth": 3, "embed_dim": 24, "num_heads": 2}
TINY = ["--data", "x", "--drop-path", "0", "--model-args", *(f"{name}={value}" for name, value in SIZE.items())]
WITHOUT_CLASS_TOKEN = ["--model", "vit_tiny_patch16_224", *TINY, "class_token=False", "global_pool=avg"]


def parse(*arguments: str) -> argparse.Namespace:
    return parse_arguments("what it is", list(arguments))


def tiny(*more: str, classes: int = 4) -> nn.Module:
    return build_model(parse(*TINY, *more), classes)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# -- defaults and help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPE)
def test_with_data_the_default_is_deits(name: str) -> None:
    assert getattr(parse("--data", "imagenet-1k"), name) == RECIPE[name]


def test_without_data_the_first_look_replaces_the_recipe_where_it_says_so_and_nowhere_else() -> None:
    recipe, first_look = vars(parse("--data", "x")), vars(parse())
    assert {name: value for name, value in first_look.items() if value != recipe[name]} == {**FIRST_LOOK, "data": None}


@pytest.mark.parametrize("given", [[], ["--data", "x"], ["--data=x"]], ids=["digits", "data", "data="])
def test_arguments_that_are_given_win_over_the_first_look_and_over_the_recipe(given: list[str]) -> None:
    # the recipe's own number for drop path, the first look's for the epochs, and one that is neither's
    args = parse(*given, "--drop-path", "0.1", "--epochs", "12", "--lr", "0.125", "--model-args", "depth=1")
    assert (args.drop_path, args.epochs, args.lr, args.model_args) == (0.1, 12, 0.125, {"depth": 1})


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Action]:
    """All options that the command has."""
    parsers: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.parse_known_args

    def spy(self, *args, **kwargs):
        parsers.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", spy)
    parse("--data", "x")
    return parsers[0]._actions


def test_every_option_is_explained(options: list[argparse.Action]) -> None:
    assert [option.option_strings[0] for option in options if not option.help] == []


def test_no_explanation_is_the_default_alone(options: list[argparse.Action]) -> None:
    explained = {option.option_strings[0]: re.sub(r"\(default: .*\)", "", option.help or "") for option in options}
    assert [name for name, words in explained.items() if not words.strip()] == []


def test_the_help_gives_every_default_as_it_is(options: list[argparse.Action]) -> None:
    numbers = [option for option in options if type(option.default) in (int, float)]
    for option in numbers:
        told = [float(found) for found in re.findall(r"\d[\d.]*(?:e-?\d+)?", option.help)]
        assert option.default in told, f"{option.option_strings[0]} is {option.default}, and its help says {told}"
    assert len(numbers) > 20


def test_the_help_names_every_setting_of_the_first_look(options: list[argparse.Action]) -> None:
    (data,) = [option for option in options if option.dest == "data"]
    assert [name for name in FIRST_LOOK if name.replace("_", "-") not in data.help] == []


def test_help_prints_the_description_as_it_is_and_every_option(options, capsys: pytest.CaptureFixture[str]) -> None:
    page = "Two lines,\n\n    the second indented."
    with pytest.raises(SystemExit) as ended:
        parse_arguments(page, ["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and page in printed
    assert all(f"  {option.option_strings[-1]}" in printed for option in options if option.dest != "help")


def test_model_arguments_are_python_values_where_they_can_be_and_text_elsewhere() -> None:
    given = ["depth=4", "global_pool=avg", "img_size=(8,16)", "qkv_bias=False", "act_layer=a=b", "drop_rate=1e-1"]
    expected = {"depth": 4, "global_pool": "avg", "img_size": (8, 16), "qkv_bias": False, "act_layer": "a=b"}
    assert parse("--model-args", *given).model_args == {**expected, "drop_rate": 0.1}
    assert parse("--teacher-args", "depth=4").teacher_args == {"depth": 4}


def test_a_model_argument_without_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--model-args", "depth")
    assert ended.value.code == 2
    assert "--model-args: 'depth' is not of the form name=value" in capsys.readouterr().err


# -- augmentation, optimizer, schedule -------------------------------------------------------------------------


def test_augmentation_is_deits() -> None:
    settings = augment_settings(parse("--data", "x"))
    assert (settings.size, settings.scale, settings.hflip, settings.erase) == (224, (0.08, 1), 0.5, 0.25)
    assert (settings.rand_augment, settings.interpolation) == ("rand-m9-n2-mstd0.5-inc1", "bicubic")
    assert (settings.crop, settings.crop_pct) == ("random-resized", 0.875)
    assert augment_settings(parse("--rand-augment", "none")).rand_augment is None


def test_mixup_is_deits_and_smooths_the_labels() -> None:
    mixup = build_mixup(parse("--data", "x"), 1000)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.switch_prob, mixup.mix_prob) == (0.8, 1.0, 0.5, 1.0)
    assert (mixup.label_smoothing, mixup.num_classes) == (0.1, 1000)


def test_mixup_is_left_out_only_when_cutmix_is_too_and_refuses_odd_batches() -> None:
    assert build_mixup(parse("--mixup", "0", "--cutmix", "0", "--batch-size", "9"), 10) is None
    assert build_mixup(parse("--mixup", "0", "--cutmix", "1"), 10).mixup_alpha == 0
    with pytest.raises(RunError, match="--batch-size 9: mixup pairs images, so it has to be even"):
        build_mixup(parse("--data", "x", "--batch-size", "9"), 10)


def test_the_rate_is_5e_4_at_512_and_1e_3_at_deits_1024() -> None:
    assert [scaled_lr(5e-4, batch) for batch in (256, 512, RECIPE_BATCH)] == [2.5e-4, 5e-4, 1e-3]
    assert RECIPE_BATCH == 1024


def test_the_optimizer_is_adamw_at_the_scaled_rate() -> None:
    optimizer = build_optimizer(tiny(), parse(*TINY), 1024)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.999), 1e-8)


@pytest.mark.parametrize("cycles", ["1", "2"])
def test_biases_norms_class_token_and_positions_do_not_decay_and_all_else_does(cycles: str) -> None:
    args = parse(*TINY, "--cycles", cycles, "--model", "deit_tiny_distilled_patch16_224")
    model = add_cycles(build_model(args, 4), args)
    decay = {id(p): g["weight_decay"] for g in build_optimizer(model, args, 512).param_groups for p in g["params"]}
    free = {name for name, parameter in model.named_parameters() if decay[id(parameter)] == 0}
    tokens = {"cls_token", "dist_token", "pos_embed"}
    assert free == tokens | {name for name, _ in model.named_parameters() if name.endswith("bias") or "norm" in name}
    assert {decay[id(p)] for name, p in model.named_parameters() if name not in free} == {0.05}


def expected_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear from 1e-6, then a cosine to 1e-5 over the whole training."""
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * step / steps)) / 2


def test_the_rate_of_every_step_is_a_linear_warm_up_and_a_cosine() -> None:
    args, steps_per_epoch = parse("--data", "x", "--epochs", "10"), 7
    optimizer = build_optimizer(tiny(), args, 1024)
    schedule = build_schedule(optimizer, args, steps_per_epoch)
    for step in (0, 1, 3, 34, 35, 36, 50, 69, 0):  # the last: a function of the step, whatever came before
        schedule.step_update(step)
        expected = expected_rate(step, 1e-3, 5 * steps_per_epoch, 10 * steps_per_epoch)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([expected] * 2, rel=1e-9), step
    schedule.step_update(70)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_a_training_shorter_than_its_warm_up_only_warms_up() -> None:
    args = parse("--data", "x", "--epochs", "2")
    optimizer = build_optimizer(tiny(), args, 1024)
    schedule = build_schedule(optimizer, args, 4)
    schedule.step_update(6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6 + (1e-3 - 1e-6) * 6 / 8)


def test_another_global_batch_is_pointed_out_with_the_rate_that_follows() -> None:
    args = parse("--data", "x")
    assert lr_warning(args, 1024) is None
    assert lr_warning(args, 2048) == (
        "the global batch is 2048, the recipe's is 1024: the rate is scaled linearly to 0.002 (= 0.0005 x 2048 / 512), "
        "as in DeiT; results at other batch sizes can differ"
    )


# -- the model, its cycles and token groups --------------------------------------------------------------------


def test_the_model_is_stock_timm_with_the_classes_of_the_data_and_deits_stochastic_depth() -> None:
    args = parse(*TINY, "--drop-path", "0.1")
    torch.manual_seed(0)
    model = build_model(args, 7)
    torch.manual_seed(0)
    stock = timm.create_model("deit_tiny_patch16_224", num_classes=7, drop_path_rate=0.1, **SIZE)
    assert type(model) is type(stock)
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in model.state_dict().items())
    dropped = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert dropped == pytest.approx([0, 0.05, 0.1])


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(RunError, match=r"--model deit_tinny: timm has no model of this name; near are "):
        build_model(parse("--model", "deit_tinny"), 4)


def test_a_mistyped_model_is_answered_with_the_one_that_was_meant() -> None:
    with pytest.raises(RunError, match=r"near are .*deit_tiny_patch16_224"):
        build_model(parse("--model", "deit_tiny_patch16_244"), 4)


def test_arguments_that_the_model_does_not_take_are_refused_with_timms_words() -> None:
    with pytest.raises(RunError, match=r"--model deit_tiny_patch16_224: timm cannot make it with .*depht=3.*depht"):
        build_model(parse("--data", "x", "--model-args", "depht=3"), 4)


@pytest.mark.parametrize("name", ["num_classes", "drop_path_rate"])
def test_model_arguments_that_have_an_option_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(RunError, match=name):
        tiny("--model-args", f"{name}=0")


def test_pretrained_starts_from_timms_weights(tmp_path: Path) -> None:
    given = timm.create_model("deit_tiny_patch16_224", num_classes=4, **SIZE).state_dict()
    save_file(given, tmp_path / "hub.safetensors")
    stored = f"pretrained_cfg_overlay={{'file': {str(tmp_path / 'hub.safetensors')!r}, 'num_classes': 4}}"
    model = build_model(parse("--pretrained", *TINY, stored), 4)
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())


def test_two_cycles_are_the_default_and_one_is_the_untouched_model() -> None:
    model, args = tiny().train(), parse(*TINY)
    assert args.cycles == 2
    assert add_cycles(model, parse(*TINY, "--cycles", "1")) is model and isinstance(model(images()), Tensor)
    assert add_cycles(model, args) is model
    output = model(images())
    assert isinstance(output, CycleOutput) and len(output.outputs) == 2


def test_less_than_one_cycle_is_refused() -> None:
    with pytest.raises(RunError, match="--cycles 0: has to be at least 1"):
        check_arguments(parse("--cycles", "0"))


NOTHING_TOGETHER = {
    "rho of one cycle": (["--cycles", "1", "--rho", "0.5"], "--rho: weighs the tokens of one cycle"),
    "alpha of one cycle": (["--cycles", "1", "--alpha", "5e-6"], "--alpha: weighs the tokens of one cycle"),
    "factors of one cycle": (
        ["--cycles", "1", "--class-weight", "2", "--patch-weight", "0"],
        "--class-weight, --patch-weight: weighs the tokens of one cycle .* --cycles is 1: leave it out",
    ),
    "two weights": (["--alpha", "5e-6", "--rho", "0.5"], "--alpha, --rho: both weigh the tokens"),
    "file of no teacher": (["--teacher-from", "x"], "--teacher-from: for an external teacher; name it with --teacher"),
    "no teacher": (
        ["--teacher-args", "depth=2", "--distillation", "soft", "--distillation-alpha", "0.3"],
        "--teacher-args, --distillation, --distillation-alpha: for an external teacher",
    ),
    "temperature of no teacher": (["--distillation-temperature", "2"], "--distillation-temperature: for an external"),
    "hard temperature": (
        ["--teacher", "t", "--distillation-temperature", "2"],
        "--distillation-temperature: softens a distribution.* add --distillation soft",
    ),
    "counted images": (["--images-per-epoch", "10"], "--images-per-epoch: goes with --streaming"),
    "cutmix alone": (["--mixup", "0", "--mixup-switch", "0.3"], "--mixup-switch: chooses between"),
    "mixup alone": (["--cutmix", "0", "--mixup-switch", "0.3"], "--mixup-switch: chooses between"),
    "head of nothing": (["--new-head"], "--new-head: goes with --init-from"),
}


@pytest.mark.parametrize(("given", "message"), NOTHING_TOGETHER.values(), ids=NOTHING_TOGETHER)
def test_arguments_that_say_nothing_together_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(RunError, match=f"^{message}"):
        check_arguments(parse("--data", "x", *given))


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--cycles", "1"],
        ["--alpha", "5e-6", "--class-weight", "2"],
        ["--teacher", "t", "--teacher-from", "x", "--distillation", "soft", "--distillation-temperature", "2"],
        ["--streaming", "--images-per-epoch", "10"],
        ["--mixup-switch", "0.3"],
    ],
)
def test_arguments_that_say_something_together_are_taken(given: list[str]) -> None:
    check_arguments(parse("--data", "x", *given))
    check_arguments(parse())


def test_class_and_patch_tokens_are_groups_once_they_are_weighed() -> None:
    args = parse(*TINY, "--class-weight", "2")
    assert token_groups(tiny(), parse(*TINY)) is None
    assert token_groups(tiny(), args) == {"class": (slice(0, 1), 2.0), "patch": (slice(1, None), 1.0)}
    distilled = tiny("--model", "deit_tiny_distilled_patch16_224")
    args = parse(*TINY, "--patch-weight", "0")
    assert token_groups(distilled, args) == {"class": (slice(0, 2), 1.0), "patch": (slice(2, None), 0.0)}


def test_token_weights_are_refused_for_a_model_without_class_token() -> None:
    model = build_model(parse(*WITHOUT_CLASS_TOKEN), 4)
    with pytest.raises(RunError, match=r"vit_tiny_patch16_224 has no class token.* weigh it with --rho"):
        token_groups(model, parse(*WITHOUT_CLASS_TOKEN, "--patch-weight", "2"))
    assert token_groups(model, parse(*WITHOUT_CLASS_TOKEN)) is None


# -- the criterion ---------------------------------------------------------------------------------------------


LOGITS = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
LABELS = torch.tensor([1, 0])
MIXED = torch.tensor([[0.2, 0.7, 0.1], [0.6, 0.0, 0.4]])
TEACHER = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


def task_loss(target: object, *arguments: str) -> Tensor:
    """The criterion's task loss of LOGITS; no model is asked as there are no token groups."""
    return build_criterion(nn.Identity(), parse("--data", "x", *arguments)).task(LOGITS, target)


def soft_cross_entropy(target: Tensor) -> Tensor:
    return -(target * LOGITS.log_softmax(1)).sum(1).mean()


def test_mixed_labels_have_a_cross_entropy_with_soft_targets() -> None:
    expected = soft_cross_entropy(MIXED)
    assert task_loss(MIXED) == task_loss(MIXED, "--mixup", "0") == task_loss(MIXED, "--cutmix", "0")
    torch.testing.assert_close(task_loss(MIXED), expected)


def test_labels_are_smoothed_where_nothing_is_mixed() -> None:
    none = ["--mixup", "0", "--cutmix", "0"]
    smoothed = 0.9 * F.one_hot(LABELS, 3) + 0.1 / 3
    torch.testing.assert_close(task_loss(LABELS, *none), soft_cross_entropy(smoothed))
    torch.testing.assert_close(task_loss(LABELS, *none, "--smoothing", "0"), F.cross_entropy(LOGITS, LABELS))


def test_a_teacher_joins_the_mixed_labels_with_deits_weights_or_those_asked_for() -> None:
    labels, target = soft_cross_entropy(MIXED), (MIXED, TEACHER)
    hard = F.cross_entropy(LOGITS, TEACHER.argmax(1))
    torch.testing.assert_close(task_loss(target, "--teacher", "t"), 0.5 * labels + 0.5 * hard)
    asked = ["--teacher", "t", "--distillation-alpha", "0.25"]
    torch.testing.assert_close(task_loss(target, *asked), 0.75 * labels + 0.25 * hard)

    def soft(temperature: float) -> Tensor:
        student, teacher = (LOGITS / temperature).softmax(1), (TEACHER / temperature).softmax(1)
        return (teacher * (teacher / student).log()).sum() * temperature**2 / LOGITS.numel()

    by_default = ["--teacher", "t", "--distillation", "soft"]
    torch.testing.assert_close(task_loss(target, *by_default), 0.9 * labels + 0.1 * soft(3))
    asked = [*by_default, "--distillation-temperature", "2", "--distillation-alpha", "0"]
    torch.testing.assert_close(task_loss(target, *asked), labels)
    asked = [*by_default, "--distillation-temperature", "2"]
    torch.testing.assert_close(task_loss(target, *asked), 0.9 * labels + 0.1 * soft(2))


def test_token_weights_reach_the_loss() -> None:
    args = parse(*TINY, "--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--alpha", "0.5", "--class-weight", "2")
    model = add_cycles(tiny(), args).train()
    output = model(images())
    parts = build_criterion(model, args)(output, torch.tensor([0, 1]))
    one, two = output.tokens
    expected = 0.5 * (2 * F.mse_loss(one[:, :1], two[:, :1]) + F.mse_loss(one[:, 1:], two[:, 1:]))
    torch.testing.assert_close(parts.tokens, expected[None])
    default = build_criterion(model, parse(*TINY))
    assert (default.rho, default.alpha, default.groups) == (0.3, None, None)
    assert build_criterion(model, parse(*TINY, "--rho", "0.7")).rho == 0.7


# -- weights from a file ---------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Weights of the tiny model for 4 classes."""
    save_file(tiny().state_dict(), tmp_path / "four.safetensors")
    return tmp_path / "four.safetensors"


def test_init_from_puts_every_tensor_in(stored: Path) -> None:
    model = tiny("--init-from", str(stored))
    expected = load_file(stored)
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_another_number_of_classes_is_refused_with_both_numbers_and_the_way_out(stored: Path) -> None:
    found = r"--init-from \S+: has 4 classes in head\.\w+, and the data has 7: add --new-head"
    with pytest.raises(RunError, match=found):
        tiny("--init-from", str(stored), classes=7)


@pytest.mark.parametrize("classes", [4, 7])
def test_new_head_takes_all_but_the_classifier(stored: Path, classes: int) -> None:
    torch.manual_seed(5)
    fresh = tiny(classes=classes).state_dict()
    torch.manual_seed(5)
    model = tiny("--init-from", str(stored), "--new-head", classes=classes)
    saved = load_file(stored)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh[name] if name.startswith("head.") else saved[name]), name
    assert not torch.equal(saved["blocks.0.attn.qkv.weight"], fresh["blocks.0.attn.qkv.weight"])


def test_new_head_means_both_heads_of_a_distilled_model(tmp_path: Path) -> None:
    distilled = ["--model", "deit_tiny_distilled_patch16_224"]
    save_file(tiny(*distilled).state_dict(), tmp_path / "file.safetensors")
    model = tiny(*distilled, "--init-from", str(tmp_path / "file.safetensors"), "--new-head", classes=7)
    assert model.head.out_features == model.head_dist.out_features == 7


def test_missing_surplus_and_misshapen_tensors_are_named(stored: Path, tmp_path: Path) -> None:
    saved = load_file(stored)
    saved["surplus"] = saved.pop("norm.bias")
    saved["pos_embed"] = saved["pos_embed"][:, :-1].contiguous()
    save_file(saved, tmp_path / "wrong.safetensors")
    words = r"does not fit the model: pos_embed is \(1, 4, 24\) and should be \(1, 5, 24\); norm.bias is missing; "
    with pytest.raises(RunError, match=words + "surplus is not in the model$"):
        tiny("--init-from", str(tmp_path / "wrong.safetensors"))


def test_of_many_wrong_tensors_some_are_named_and_the_rest_counted(stored: Path) -> None:
    with pytest.raises(RunError, match=r"blocks\.2\.\S+ is not in the model.* and 8 more$"):
        tiny("--init-from", str(stored), "--model-args", *(f"{k}={v}" for k, v in {**SIZE, "depth": 2}.items()))


def test_a_head_of_another_width_is_no_matter_of_classes(stored: Path) -> None:
    wide = [f"{name}={value}" for name, value in {**SIZE, "embed_dim": 48}.items()]
    with pytest.raises(RunError, match="does not fit the model"):
        tiny("--init-from", str(stored), "--model-args", *wide)


@pytest.mark.parametrize("kept", [0, 5, 1000, -10])
def test_a_truncated_file_is_refused(stored: Path, kept: int) -> None:
    stored.write_bytes(stored.read_bytes()[:kept])
    with pytest.raises(RunError, match=r"--init-from \S+four\.safetensors: cannot be read as safetensors \("):
        load_weights(tiny(), stored, "--init-from")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--init-from .*absent: there is no such file"):
        tiny("--init-from", str(tmp_path / "absent"))
