"""Train TokenPose, SDPose or PPT on key points, with self-distillation between cycles: from one CPU to many nodes.

    accelerate launch examples/train_tokenpose.py                               # synthetic figures: a first look
    accelerate launch examples/train_tokenpose.py --data coco                   # the paper's recipe, on all GPUs
    accelerate launch examples/train_tokenpose.py --data coco --model tokenpose_s_v1       # the plain baseline
    accelerate launch examples/train_tokenpose.py --data coco --out runs/mine --resume

Without --data a small model learns figures that are drawn for it, with settings to fit: enough to see every part at
work, not to judge the method. With --data the defaults are the paper's for COCO on 8 GPUs. The folder is in COCO's or
CrowdPose's layout; any COCO key point file will do, with key points, names and flip pairs of its own.

The run folder ends up with the plain model (`from_pretrained` loads it), people with what it predicts for them in a
picture, its card, the curves, the log and the last checkpoints. Fine-tuning on other key points begins with such a
model: --init-from runs/mine/model --new-head.
"""

import sys

from cyclekd.integrations.tokenpose.training.train import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
