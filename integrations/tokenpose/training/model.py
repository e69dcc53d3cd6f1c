"""The model that a run's arguments ask for, new or from an earlier one's weights."""

from __future__ import annotations

import argparse

from torch import nn

from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.tokenpose.models.config import PoseConfig, TokenPoseConfig, config_for
from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.weights.hub import from_pretrained, read_config, saved_model
from cyclekd.integrations.tokenpose.weights.layouts import some

MODEL = "sdpose_s_v1"


def build_model(args: argparse.Namespace, num_keypoints: int) -> nn.Module:
    """The model for that many key points, wrapped where it has several cycles; in training mode.

    Errors: PoseError for an unknown name or fields, and for weights that do not fit.
    """
    settings = {**args.model_args, "num_keypoints": num_keypoints}
    if args.init_from is not None:
        model = load_model(args, settings)
    else:
        name = args.model or MODEL
        settings |= cycles_of(args, isinstance(config_for(name), TokenPoseConfig))
        model = create_model(name, pretrained_backbone=args.pretrained_backbone, **settings)
    return model.train()


def named_config(args: argparse.Namespace) -> PoseConfig:
    """Of the model that is asked for, before other arguments change it. Errors: PoseError where there is none."""
    return config_for(args.model or MODEL) if args.init_from is None else read_config(saved_model(args.init_from))


def load_model(args: argparse.Namespace, settings: dict[str, object]) -> nn.Module:
    """That of --init-from, with these settings. Errors: RunError where it is not the --model, and PoseError."""
    before = from_pretrained(saved_model(args.init_from))
    config = before.config
    if args.model not in (None, config.name):
        raise RunError(f"--init-from {args.init_from}: holds {config.name} and not --model {args.model}; leave one out")
    if config.num_keypoints != settings["num_keypoints"] and not args.new_head:
        raise RunError(
            f"--init-from {args.init_from}: predicts {config.num_keypoints} key points, and the data have "
            f"{settings['num_keypoints']}: add --new-head to take over all weights but those that depend on it"
        )
    settings |= cycles_of(args, isinstance(config, TokenPoseConfig))
    model = from_pretrained(saved_model(args.init_from), strict=False, **settings)
    if (others := unlike(model, before)) and not args.new_head:
        raise RunError(
            f"--init-from {args.init_from}: has other weights than --model-args ask for, {some(others)}: leave these "
            "arguments out, or add --new-head to begin at random there and to take over all others"
        )
    return model


def unlike(model: nn.Module, other: nn.Module) -> list[str]:
    """Names of weights that one of the two models has alone, or in another shape."""
    one, two = ({name: value.shape for name, value in each.state_dict().items()} for each in (model, other))
    return [name for name in one | two if one.get(name) != two.get(name)]


def cycles_of(args: argparse.Namespace, has_blocks: bool) -> dict[str, int]:
    """The field of a config that --cycles sets; a model without blocks makes one pass anyway."""
    return {} if args.cycles is None or (args.cycles == 1 and not has_blocks) else {"cycles": args.cycles}
