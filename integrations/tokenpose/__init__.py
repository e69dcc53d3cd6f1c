"""Pose estimation with tokens: TokenPose, SDPose, PPT and DistilPose, and two convolutional models to compare with.

    from cyclekd.integrations.tokenpose import create_model

    model = create_model("sdpose_s_v1")  # two cycles in training, one pass in evaluation
    heatmaps = model.eval()(images)  # [B, 3, 256, 192] to [B, 17, 64, 48]

Models by name are in create.py and config.py; what they learn in targets.py, losses.py and distilpose.py; what is made
of their outputs in decoding.py, flips.py and scoring.py; files in reference.py (published checkpoints), hub.py and
export.py; people of COCO and CrowdPose in people.py, their average precision in evaluation.py (which is not imported
here, as it needs pycocotools); key points of your own images in predict.py.
"""

from cyclekd.integrations.tokenpose.baselines import ConvPose
from cyclekd.integrations.tokenpose.config import ConvPoseConfig, TokenPoseConfig
from cyclekd.integrations.tokenpose.create import create_model, list_models
from cyclekd.integrations.tokenpose.decoding import Keypoints, decode_heatmaps, to_image, to_image_aligned
from cyclekd.integrations.tokenpose.detection import HFDetector
from cyclekd.integrations.tokenpose.distilpose import DistilPoseLoss
from cyclekd.integrations.tokenpose.drawing import draw_poses
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.export import KeypointModel, decode_output, export_onnx
from cyclekd.integrations.tokenpose.flips import predict_flipped
from cyclekd.integrations.tokenpose.hub import from_pretrained, push_to_hub, save_pretrained
from cyclekd.integrations.tokenpose.losses import HeatmapLoss, RLELoss
from cyclekd.integrations.tokenpose.model import TokenPose, annealed_keep_rate, set_keep_rate, token_groups
from cyclekd.integrations.tokenpose.people import People, read_people
from cyclekd.integrations.tokenpose.predict import PosePredictor
from cyclekd.integrations.tokenpose.reference import load_reference_checkpoint
from cyclekd.integrations.tokenpose.skeletons import COCO, CROWDPOSE, Skeleton
from cyclekd.integrations.tokenpose.targets import Target, coordinate_target, heatmap_target

__all__ = [
    "COCO",
    "CROWDPOSE",
    "ConvPose",
    "ConvPoseConfig",
    "DistilPoseLoss",
    "HFDetector",
    "HeatmapLoss",
    "KeypointModel",
    "Keypoints",
    "People",
    "PoseError",
    "PosePredictor",
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
    "draw_poses",
    "export_onnx",
    "from_pretrained",
    "heatmap_target",
    "list_models",
    "load_reference_checkpoint",
    "predict_flipped",
    "push_to_hub",
    "read_people",
    "save_pretrained",
    "set_keep_rate",
    "to_image",
    "to_image_aligned",
    "token_groups",
]
