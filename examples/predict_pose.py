"""Find people's key points in photographs or in a video, and draw them.

    python examples/predict_pose.py MODEL photo.jpg --out found                       # one person fills the photo
    python examples/predict_pose.py MODEL FOLDER --detector facebook/detr-resnet-50 --out found
    python examples/predict_pose.py MODEL FOLDER --boxes boxes.json --out found       # you know where people are
    python examples/predict_pose.py MODEL film.mp4 --detector facebook/detr-resnet-50 --out found

MODEL is the folder of a training (examples/train_tokenpose.py, which leaves the model in its model/), one of
save_pretrained, or such a repository on the hub. The folder `found` gets every picture with its skeletons under the
name it had (left sides in warm colours, right sides in cool ones), or the film as .mp4 without sound, and
predictions.json, a result file in COCO's form: a row for each person with [x, y, score] of every key point in pixels.
What cannot be read is left out and counted. Nothing is written over. A GPU is used where there is one.

Install with `pip install -e ".[pose]"`; --detector needs transformers (and timm for DETR), a video needs av. The exit
code is 0, or 2 after an error that a user can put right.
"""

import argparse
import sys
import time
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder
from cyclekd.integrations.tokenpose import COCO, CROWDPOSE, PoseError, from_pretrained
from cyclekd.integrations.tokenpose.data.annotations import read_annotations
from cyclekd.integrations.tokenpose.prediction.detection import HFDetector, read_boxes, read_image_ids
from cyclekd.integrations.tokenpose.prediction.drawing import draw_poses
from cyclekd.integrations.tokenpose.prediction.predictor import PosePredictor
from cyclekd.integrations.tokenpose.prediction.results import ResultFile, coco_results
from cyclekd.integrations.tokenpose.prediction.video import Video, write_video
from cyclekd.integrations.tokenpose.weights.hub import saved_model

IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


def main(arguments=None):
    """The exit code: 0, or 2 for what a user can put right."""
    args = parse_arguments(arguments)
    try:
        source = find_source(args)
        predictor = make_predictor(args)
        detector = HFDetector(args.detector, args.detector_threshold, args.device) if args.detector else None
        out = RunFolder.create(args.out, "predict_pose").path
        predict = predict_video if isinstance(source, Video) else predict_photos
        print(predict(source, predictor, detector, out, args))
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def find_source(args):
    """The photographs to read, or a `Video`."""
    path = args.source
    if path.suffix.lower() in VIDEOS and path.is_file():
        if args.boxes:
            raise PoseError(f"--boxes is for photographs; {path} is a video, for which there is --detector")
        return Video(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    photos = [file for file in files if file.suffix.lower() in IMAGES and file.is_file()]
    if not photos:
        seen = "has no photograph in it" if path.is_dir() else "is neither" if path.exists() else "does not exist"
        raise PoseError(f"{path} {seen}: name a photograph ({', '.join(sorted(IMAGES))}), a folder of them, or a video")
    return photos


def make_predictor(args):
    model = from_pretrained(saved_model(args.model))
    options = {"device": args.device, "batch_size": args.batch, "precision": args.precision}
    return PosePredictor(model, skeleton=find_skeleton(args.skeleton), flip=args.flip, **options)


def find_skeleton(name):
    known = {"coco": COCO, "crowdpose": CROWDPOSE}
    if name not in known and not Path(name).is_file():
        raise PoseError(f"--skeleton {name}: there is no such file; write {', '.join(known)}, or an annotation file")
    return known.get(name) or read_annotations(Path(name)).skeleton


def predict_photos(photos, predictor, detector, out, args):
    """Write every photo with its skeletons, and predictions.json; a summary."""
    boxes = boxes_of(photos, args.boxes) if args.boxes else None
    ids, left_out = image_ids(photos, args.boxes), []

    def note(photo, error):
        left_out.append(photo)
        tqdm.write(f"left out: {error}", file=sys.stderr)

    start = time.perf_counter()
    with ResultFile(out / "predictions.json") as results:
        for photo, image, poses in predictor.predict_images(photos, boxes, detector=detector, on_left_out=note):
            drawn = draw_poses(image, poses.keypoints, poses.scores, predictor.skeleton, threshold=args.threshold)
            Image.fromarray(drawn).save(out / photo.name, quality=92)
            results.write(coco_results(poses, ids[photo], photo.name))
        if len(left_out) == len(photos):
            raise PoseError(f"none of the {len(photos)} files in {args.source} could be used")
    seconds = time.perf_counter() - start
    return summary(len(photos) - len(left_out), "images", results.count, len(left_out), seconds, predictor, out)


def predict_video(video, predictor, detector, out, args):
    """Write the video with skeletons, or its frames, and predictions.json; a summary."""

    def drawn():
        predictions = predictor.predict_images(video, detector=detector)
        for number, (_, image, poses) in enumerate(predictions, 1):
            results.write(coco_results(poses, number, f"{number:06}.jpg"))
            yield draw_poses(image, poses.keypoints, poses.scores, predictor.skeleton, threshold=args.threshold)

    start, frames = time.perf_counter(), 0
    with ResultFile(out / "predictions.json") as results:
        if args.frames:
            for frames, frame in enumerate(drawn(), 1):
                Image.fromarray(frame).save(out / f"{frames:06}.jpg", quality=92)
        else:
            frames = write_video(out / f"{video.path.stem}.mp4", drawn(), video.fps)
    seconds = time.perf_counter() - start
    return summary(frames, "frames", results.count, 0, seconds, predictor, out)


def boxes_of(photos, file):
    """Boxes by file name, none for photos that the file does not name."""
    named = read_boxes(file)
    if not any(photo.name in named for photo in photos):
        raise PoseError(f"--boxes {file} names none of the photographs, but {', '.join(list(named)[:3]) or 'nothing'}")
    return {photo.name: named.get(photo.name, []) for photo in photos}


def image_ids(photos, boxes):
    """Those of the file of boxes where it has them; else COCO's files are named by theirs, and others are counted."""
    given = read_image_ids(boxes) if boxes else {}
    if given:
        return {photo: given.get(photo.name) for photo in photos}  # one that it does not name has nobody in it
    stems = [photo.stem for photo in photos]
    named_by_id = all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems)
    return {photo: int(photo.stem) if named_by_id else number for number, photo in enumerate(photos, 1)}


def summary(images, what, people, left_out, seconds, predictor, out):
    lost = f", {left_out} left out" if left_out else ""
    rate = f"{images / seconds:.1f} {what}/s on {predictor.device.type} with reading and drawing"
    return f"{images} {what}{lost}, {people} people, {rate}. Wrote {out}"


def parse_arguments(arguments=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a training, folder of save_pretrained, or repository on the hub")
    add("source", metavar="SOURCE", type=Path, help="a photograph, a folder of them, or a video")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--boxes",
        type=Path,
        metavar="FILE.json",
        help='where people are: {"photo.jpg": [[x, y, width, height], ...]}, a COCO annotation file, or a '
        "predictions.json (default: one person per photo, as large as it)",
    )
    where.add_argument("--detector", metavar="NAME", help="of Hugging Face, that finds people; a repository or folder")
    add("--detector-threshold", type=float, default=0.5, metavar="P", help="score of a person to count (default: 0.5)")
    add("--out", type=Path, metavar="FOLDER", help="new or empty (default: first free of runs/predict_pose, ...-2)")
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="average with the mirrored picture, as in the papers' figures; --no-flip takes half the time",
    )
    add("--threshold", type=float, default=0.3, metavar="P", help="score of a key point to be drawn (default: 0.3)")
    add("--frames", action="store_true", help="of a video: write numbered pictures instead of a film")
    add(
        "--skeleton",
        default="coco",
        metavar="NAME|FILE",
        help="the model's key points: coco (17), crowdpose (14), or the annotation file that it was trained on",
    )
    add("--batch", type=int, default=32, metavar="N", help="people at once (default: 32)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is faster on GPUs (default: fp32)")
    add("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
