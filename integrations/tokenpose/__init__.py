"""Pose estimation with tokens: TokenPose, SDPose, PPT and DistilPose, and two convolutional models to compare with.

    from cyclekd.integrations.tokenpose import create_model

    model = create_model("sdpose_s_v1")  # two cycles in training, one pass in evaluation
    heatmaps = model.eval()(images)  # [B, 3, 256, 192] to [B, 17, 64, 48]

Models by name are in create.py and config.py; what they learn in targets.py, losses.py and distilpose.py; what is made
of their outputs in decoding.py, flips.py and scoring.py; files in reference.py (published checkpoints), hub.py and
export.py.
"""

from cyclekd.integrations.tokenpose.baselines import ConvPose
from cyclekd.integrations.tokenpose.config import ConvPoseConfig, TokenPoseConfig
from cyclekd.integrations.tokenpose.create import create_model, list_models
from cyclekd.integrations.tokenpose.decoding import Keypoints, decode_heatmaps
from cyclekd.integrations.tokenpose.distilpose import DistilPoseLoss
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.export import KeypointModel, decode_output, export_onnx
from cyclekd.integrations.tokenpose.hub import from_pretrained, push_to_hub, save_pretrained
from cyclekd.integrations.tokenpose.losses import HeatmapLoss, RLELoss
from cyclekd.integrations.tokenpose.model import TokenPose, annealed_keep_rate, set_keep_rate, token_groups
from cyclekd.integrations.tokenpose.reference import load_reference_checkpoint
from cyclekd.integrations.tokenpose.skeletons import COCO, CROWDPOSE, Skeleton
from cyclekd.integrations.tokenpose.targets import Target, coordinate_target, heatmap_target

__all__ = [
    "COCO",
    "CROWDPOSE",
    "ConvPose",
    "ConvPoseConfig",
    "DistilPoseLoss",
    "HeatmapLoss",
    "KeypointModel",
    "Keypoints",
    "PoseError",
    "RLELoss",
    "Skeleton",
    "Target",
    "TokenPose",
    "TokenPoseConfig",
    "annealed_keep_rate",
    "coordinate_target",
    "create_model",
    "decode_heatmaps",
    "decode_output",
    "export_onnx",
    "from_pretrained",
    "heatmap_target",
    "list_models",
    "load_reference_checkpoint",
    "push_to_hub",
    "save_pretrained",
    "set_keep_rate",
    "token_groups",
]
