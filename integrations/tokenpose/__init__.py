"""Pose estimation with tokens: TokenPose, SDPose, PPT and DistilPose, and two convolutional models to compare with.

    from cyclekd.integrations.tokenpose import create_model

    model = create_model("sdpose_s_v1")  # two cycles in training, one pass in evaluation
    heatmaps = model.eval()(images)  # [B, 3, 256, 192] to [B, 17, 64, 48]

Networks are in models/, what they learn from in losses/, the way between their pixels and an image's in keypoints/,
their files in weights/; people of COCO and CrowdPose in data/, drawn ones in figures/, key points of your own images in
prediction/; average precision in evaluation/, behind examples/evaluate_pose.py (not imported here, as it needs
pycocotools), and training/ is behind examples/train_tokenpose.py.
"""

from cyclekd.integrations.tokenpose.data.people import People, read_people
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import Keypoints, decode_heatmaps, to_image, to_image_aligned
from cyclekd.integrations.tokenpose.keypoints.export import KeypointModel, decode_output, export_onnx
from cyclekd.integrations.tokenpose.keypoints.flips import predict_flipped
from cyclekd.integrations.tokenpose.losses.distilpose import DistilPoseLoss
from cyclekd.integrations.tokenpose.losses.supervised import HeatmapLoss, RLELoss
from cyclekd.integrations.tokenpose.losses.targets import Target, coordinate_target, heatmap_target
from cyclekd.integrations.tokenpose.models.baselines import ConvPose
from cyclekd.integrations.tokenpose.models.config import ConvPoseConfig, TokenPoseConfig
from cyclekd.integrations.tokenpose.models.create import create_model, list_models
from cyclekd.integrations.tokenpose.models.tokenpose import TokenPose, annealed_keep_rate, set_keep_rate, token_groups
from cyclekd.integrations.tokenpose.prediction.detection import HFDetector
from cyclekd.integrations.tokenpose.prediction.drawing import draw_poses
from cyclekd.integrations.tokenpose.prediction.predictor import PosePredictor
from cyclekd.integrations.tokenpose.skeletons import COCO, CROWDPOSE, Skeleton
from cyclekd.integrations.tokenpose.weights.hub import from_pretrained, push_to_hub, save_pretrained
from cyclekd.integrations.tokenpose.weights.reference import load_reference_checkpoint

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
