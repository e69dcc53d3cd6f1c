"""Train DeiT-Tiny, or any timm model, with self-distillation between cycles: from one CPU to many nodes.

    accelerate launch examples/train_deit.py                              # handwritten digits on a CPU: a first look
    accelerate launch examples/train_deit.py --data imagenet-1k           # DeiT's recipe, 300 epochs, on all GPUs
    accelerate launch examples/train_deit.py --data FOLDER --cycles 1     # the plain baseline
    accelerate launch examples/train_deit.py --data FOLDER --out runs/mine --resume

One process can be started by `python` as well; it then gets a SIGTERM itself, which `accelerate launch` keeps from it.
Without --data a small model learns the digits inside scikit-learn, with settings to fit: enough to see every part at
work, not to judge the method. With --data the defaults are DeiT's recipe, for ImageNet-1k at 224 pixels and a global
batch of 1,024. FOLDER holds class folders, parquet files or webdataset shards, in train and val.

The run folder ends up with the plain model (stock timm loads it), its card, the curves, the log and the last
checkpoints. Settings for several GPUs, several nodes, FSDP2, DeepSpeed and Slurm lie in examples/launch; what a run
costs stands in docs/scale.md.
"""

import sys

from cyclekd.integrations.deit.train import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
