"""Evaluate a pose model on COCO, CrowdPose or your own people: AP of every cycle, PCK, speed, and a result file.

    python examples/evaluate_pose.py --model runs/mine --data coco
    python examples/evaluate_pose.py --model MODEL --data coco --boxes COCO_val2017_detections_AP_H_56_person.json
    python examples/evaluate_pose.py --checkpoint tokenpose_s_v1.pth --data coco --exact-crops       # as published
    accelerate launch examples/evaluate_pose.py --model MODEL --annotations image_info_test-dev2017.json \\
        --images test2017 --boxes COCO_test-dev2017_detections_AP_H_609_person.json          # for COCO's server

MODEL is the folder of a training, a folder of save_pretrained, or such a repository on the hub. The saved model is a
plain one; its cycles stand in its config, and all of them are evaluated unless --cycles says otherwise. Cycle 1 is the
single pass that is deployed.

With ground-truth boxes a model does better than with a detector's, so every line says whose they were; published
figures on COCO are with a detector's. The folder gets results.json with all figures, and in COCO's result format
predictions.json of cycle 1, predictions_2.json of cycle 2, and so on. Nothing is written over.
"""

import sys

from cyclekd.integrations.tokenpose.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
