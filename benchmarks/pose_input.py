"""Persons per second that one core prepares for a pose training: ours, with and without a cache, against OpenCV.

    python benchmarks/pose_input.py --data COCO                      # a folder in COCO's layout: about a minute
    python benchmarks/pose_input.py --data COCO --resize 640 --input-sizes 256x192 128x96

What is compared with is the usual way: for every person OpenCV reads the whole photograph and cuts the view out, and
NumPy normalises it and draws the heat maps. Ours reads what is round the person, and leaves the rest to the device that
trains; "+ warp" and "+ targets" do that too on this core, as a training without a GPU would. The same work is done by
"OpenCV" and "+ warp", and by "OpenCV + targets" and "+ warp + targets". "exact" cuts views as OpenCV does, in NumPy.
All see the same persons in the same random views, in batches of PyTorch's loader without workers, on one thread.
Variants take turns within every round; a ratio is the median over rounds of paired ratios of times, with the 95 %
bootstrap interval of that median. Files come out of memory: no disk is timed.

--resize adds the same data with photographs of that longer side: COCO's have 640 px, and smaller copies of them are
cheaper to read whole. OpenCV is no dependency of this library: pip install opencv-python-headless.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

if not __package__:  # run as a script: the folder in which `benchmarks` lies is where imports start
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.pose.opencv import SIGMA, STD, STRIDE, OpenCvCrops, map_size
from benchmarks.records import RESULTS, free_path, origin, print_rows, write_rows
from benchmarks.speed.timing import WARM_UP, paired_ratio, time_in_turns
from cyclekd.integrations.runs.loading import Batch, load_batches
from cyclekd.integrations.runs.sampling import TrainingBatches
from cyclekd.integrations.tokenpose.data.crops import TrainingCrops, cut_views
from cyclekd.integrations.tokenpose.data.people import People, read_people
from cyclekd.integrations.tokenpose.data.views import ViewSettings
from cyclekd.integrations.tokenpose.data.warp import normalize
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.losses.targets import heatmap_target
from cyclekd.integrations.tokenpose.shapes import Size

OPENCV, BARE = "OpenCV + targets", "OpenCV"
OURS = ("pixel cache", "JPEG cache", "photographs", "exact")
VARIANTS = (
    *(OPENCV, BARE, *OURS),
    *("pixel cache + warp", "pixel cache + warp + targets", "JPEG cache + warp", "photographs + warp"),
)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    args.cv2.setNumThreads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side, input_size in product([None, *args.resize], args.input_sizes):
            people = people_of(args, side, Path(folder))
            with tempfile.TemporaryDirectory(dir=folder) as caches:
                feeds = Feeds(people, input_size, Path(caches), args)
                about = describe(feeds, side)
                print(f"\n{', '.join(f'{key} {value}' for key, value in about.items())}")
                found = measure(feeds)
            print_rows(found)
            rows += [row | about for row in found]
    path = free_path(args.out or RESULTS / f"pose-input-{platform.machine()}-torch{torch.__version__}.csv")
    source = provenance(args)
    write_rows(path, [row | source for row in rows])
    print(f"\nwritten to {path}")


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with annotations/person_keypoints_<split>.json and <split>/")
    add("--split", default="train2017")
    add("--resize", type=int, nargs="*", default=[], help="longer sides in px of further copies of the photographs")
    add("--input-sizes", type=size, nargs="+", default=[(256, 192)], help="of the network, height x width")
    add("--quality", type=int, default=90, help="of these copies as JPEG files; COCO's have 160 KiB on average")
    add("--batch", type=int, default=32, help="persons per variant and round")
    add("--rounds", type=int, default=40, help="each times every variant once")
    add("--out", type=Path, help="results file; pose-input-<processor>-torch<version>.csv in benchmarks/results")
    add("--seed", type=int, default=0)
    args = parser.parse_args(given)
    if args.batch < 1 or args.rounds < 2 or min(args.resize, default=1) < 1:
        parser.error("--batch and --resize are at least 1, --rounds at least 2")
    try:
        import cv2
    except ImportError:
        parser.error("OpenCV is what is compared with, and it is not installed: pip install opencv-python-headless")
    try:
        args.persons = len(people_of(args, None, args.data))
    except PoseError as error:
        parser.error(str(error))
    if args.persons < args.batch:
        parser.error(f"--batch {args.batch}: {args.data} has {args.persons} persons in {args.split}")
    args.cv2 = cv2
    return args


def size(text: str) -> Size:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) % STRIDE == int(width) % STRIDE == 0):
        raise argparse.ArgumentTypeError(f"{text} is no height x width in multiples of {STRIDE}, such as 256x192")
    return int(height), int(width)


# -- what is read ------------------------------------------------------------------------------------------------------


def people_of(args: argparse.Namespace, side: int | None, folder: Path) -> People:
    """Those to train on; with `side`, of a copy with photographs of this longer side that is made in `folder`."""
    data = args.data if side is None else folder / str(side)
    if not data.exists() and side is not None:
        resize(args.data, args.split, side, args.quality, data)
    return read_people(
        data / "annotations" / f"person_keypoints_{args.split}.json", data / args.split, for_training=True
    )


def resize(data: Path, split: str, side: int, quality: int, folder: Path) -> None:
    """A copy of a split, in COCO's layout, whose photographs' longer side is `side`."""
    labels = json.loads((data / "annotations" / f"person_keypoints_{split}.json").read_text())
    (folder / "annotations").mkdir(parents=True)
    (folder / split).mkdir()
    factors = {}
    for record in labels["images"]:
        with Image.open(data / split / record["file_name"]) as photo:
            width, height = (round(length * side / max(photo.size)) for length in photo.size)
            copy = photo.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        copy.save(folder / split / record["file_name"], "JPEG", quality=quality)
        factors[record["id"]] = width / record["width"], height / record["height"]
        record |= {"width": width, "height": height}
    for person in labels["annotations"]:
        x, y = factors[person["image_id"]]
        person["bbox"] = [length * factor for length, factor in zip(person["bbox"], (x, y, x, y), strict=True)]
        person["keypoints"] = [v * (x, y, 1)[i % 3] for i, v in enumerate(person["keypoints"])]
        person["area"] = person["area"] * x * y
        person.pop("segmentation", None)
    (folder / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(labels))


# -- measuring ---------------------------------------------------------------------------------------------------------


class Feeds:
    """What every variant reads, for one set of photographs and one input size."""

    def __init__(self, people: People, input_size: Size, folder: Path, args: argparse.Namespace) -> None:
        """`folder` takes the caches."""
        self.people, self.input_size, self.folder, self.args = people, input_size, folder, args
        settings = ViewSettings()
        self.datasets: dict[str, Dataset[Any]] = {
            OPENCV: OpenCvCrops(people, input_size, settings, targets=True),
            BARE: OpenCvCrops(people, input_size, settings, targets=False),
            "pixel cache": TrainingCrops(people, input_size, settings, cache=folder / "pixel cache", compress=False),
            "JPEG cache": TrainingCrops(people, input_size, settings, cache=folder / "JPEG cache"),
            "photographs": TrainingCrops(people, input_size, settings),
            "exact": TrainingCrops(people, input_size, settings, exact=True),
        }

    def batches(self, variant: str) -> Iterator[Batch]:
        """Enough for all rounds: the same persons in the same views for every variant."""
        args, dataset = self.args, self.dataset(variant)
        epochs = -(-args.batch * (WARM_UP + args.rounds) // (len(self.people) // args.batch * args.batch))
        order = TrainingBatches(len(self.people), batch=args.batch, epochs=epochs, seed=args.seed)
        return iter(load_batches(dataset, order, 0, torch.device("cpu")))

    def dataset(self, variant: str) -> Dataset[Any]:
        return self.datasets[variant if variant == OPENCV else variant.partition(" + ")[0]]

    def bytes_read(self, variant: str) -> float:
        """Per person on average, of a cache or of whole photographs."""
        if isinstance(self.dataset(variant), TrainingCrops) and "cache" in variant:
            files = (self.folder / variant.partition(" + ")[0]).glob("*.arrow")
            return sum(path.stat().st_size for path in files) / len(self.people)
        return statistics.mean(self.people.images[i].stat().st_size for i in self.people.image_index.tolist())

    def step(self, variant: str) -> Callable[[], None]:
        """Prepares a batch."""
        batches, ours = self.batches(variant), variant not in (OPENCV, BARE)

        def prepare() -> None:
            batch = next(batches)
            if ours and "warp" in variant:
                self.crops(batch)
            if ours and "targets" in variant:
                sizes = {"input_size": self.input_size, "heatmap_size": map_size(self.input_size)}
                heatmap_target(batch["keypoints"], batch["visible"], sigma=SIGMA, **sizes)

        return prepare

    def crops(self, batch: Batch) -> Tensor:
        """What the network sees, [B, 3, H, W]."""
        return normalize(cut_views(batch, self.input_size))

    def grey_levels_off(self, variant: str) -> float:
        """Of the pixels of one batch from OpenCV's on average."""
        theirs, ours = next(self.batches(BARE))["image"], self.crops(next(self.batches(variant)))
        return float(((ours - theirs).abs().mean((0, 2, 3)) * torch.from_numpy(STD)).mean())


def measure(feeds: Feeds) -> list[dict[str, object]]:
    """A row for every variant."""
    args = feeds.args
    seconds = time_in_turns({name: feeds.step(name) for name in VARIANTS}, args.rounds, args.seed)
    return [as_row(name, seconds, feeds) for name in VARIANTS]


def as_row(name: str, seconds: dict[str, list[float]], feeds: Feeds) -> dict[str, object]:
    persons, off = feeds.args.batch, "" if name in (OPENCV, BARE) else f"{feeds.grey_levels_off(name):.2f}"
    low, median, high = (1000 * value / persons for value in statistics.quantiles(seconds[name], n=4))
    batch = next(feeds.batches(name))
    return {
        "variant": name,
        "persons/s": f"{1000 / median:.0f}",
        "ms": f"{median:.3f}",
        "quartiles": f"{low:.3f} to {high:.3f}",
        f"{OPENCV} / it": paired_ratio(seconds[OPENCV], seconds[name]),
        f"{BARE} / it": paired_ratio(seconds[BARE], seconds[name]),
        "grey levels off": off,
        "KiB read": f"{feeds.bytes_read(name) / 2**10:.0f}",
        "KiB to device": f"{sum(value.nbytes for value in batch.values()) / persons / 2**10:.0f}",
        "rounds": len(seconds[name]),
    }


def describe(feeds: Feeds, side: int | None) -> dict[str, str]:
    people, (height, width), args = feeds.people, feeds.input_size, feeds.args
    return {
        "input": f"{height}x{width}",
        "photographs": "as they are" if side is None else f"resized to {side} px, quality {args.quality}",
        "longer side": f"{people.image_sizes.max(1).values.double().mean():.0f}",
        "images": str(len(people.images)),
        "persons": str(len(people)),
    }


def provenance(args: argparse.Namespace) -> dict[str, str]:
    return {
        "batch": str(args.batch),
        "processor": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "opencv": args.cv2.__version__,
        "pillow": PIL.__version__,
        **origin(),
    }


if __name__ == "__main__":
    main()
