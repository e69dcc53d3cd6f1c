"""Video in and out, frame by frame, so that its length takes no memory.

Frames that are read are turned upright, as the telephone noted it. PyAV is imported only once a video is opened or
written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.prediction.photos import first_line

CODEC = "libx264"


class Video:
    """Frames of a video, uint8 [H, W, 3] each, as they come; `fps`, and `count`, 0 where the file does not say.

    Of a film whose frames last differently long, `fps` is the mean; sound is not read. Needs PyAV. Errors: PoseError
    where it is missing, for files that are no video, and at a frame that cannot be decoded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, av = Path(path), _av()
        try:
            with av.open(str(path)) as file:
                stream = file.streams.video[0]
                self.fps = float(stream.average_rate or stream.guessed_rate or 25)
                self.count = stream.frames
        except (av.FFmpegError, IndexError) as error:
            raise PoseError(f"{path} cannot be read as a video: {_no_stream(error)}") from error

    def __length_hint__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        av, frames = _av(), 0
        try:
            with av.open(str(self.path)) as file:
                file.streams.video[0].thread_type = "AUTO"
                for frame in file.decode(video=0):
                    frames += 1
                    turns = round(frame.rotation / 90)  # telephones note how they were held
                    yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
        except av.FFmpegError as error:
            raise PoseError(
                f"{self.path} cannot be read on after frame {frames}: {first_line(error)}; convert it first, as in "
                "ffmpeg -i old.mp4 new.mp4"
            ) from error


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Write frames, uint8 [H, W, 3], as H.264 in .mp4 without sound, as they come; how many there were.

    The file appears when it is whole. Odd sizes lose their last row or column, which the format has no place for; a
    frame of another size than the first is stretched to that. Needs PyAV. Errors: PoseError where it is missing or
    cannot write H.264, for other frames, and where `path` exists, cannot be written or is no .mp4.
    """
    path, av = Path(path), _av()
    _check_video(path, fps)
    partial = path.with_name(f".{path.stem}.partial.mp4")
    count = 0
    try:
        with av.open(str(partial), "w") as file:
            stream = file.add_stream(CODEC, rate=Fraction(fps).limit_denominator(1001), options={"crf": "20"})
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                pixels = _of_even_size(path, frame)
                if not count:
                    stream.height, stream.width = pixels.shape[:2]
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                count += 1
            if not count:
                raise PoseError(f"write_video({str(path)!r}): there is no frame to write")
            file.mux(stream.encode())
        partial.rename(path)
    except (av.FFmpegError, OSError) as error:
        raise PoseError(f"{path} cannot be written: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise PoseError("video needs PyAV: pip install av") from error
    if not hasattr(av.VideoFrame, "rotation"):  # without it, films of telephones would lie on their side
        raise PoseError(f"video needs PyAV 14 or later, and this is {av.__version__}: pip install -U av")
    return av


def _check_video(path: Path, fps: float) -> None:
    if path.suffix.lower() != ".mp4" or path.exists():
        raise PoseError(f"write_video({str(path)!r}): " + ("this file exists" if path.exists() else "name it .mp4"))
    if not (math.isfinite(fps) and fps > 0):
        raise PoseError(f"write_video(fps={fps}): frames per second are a number above 0, such as 25")
    if CODEC not in _av().codecs_available:
        raise PoseError(f"write_video: this PyAV cannot write H.264 ({CODEC}); the one of pip install av can")


def _of_even_size(path: Path, frame: np.ndarray) -> np.ndarray:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or min(frame.shape[:2]) < 2:
        raise PoseError(
            f"write_video({str(path)!r}): frames are uint8 [H, W, 3] of 2 x 2 pixels or more, and this one is "
            f"{frame.dtype} {list(frame.shape)}"
        )
    height, width = (size - size % 2 for size in frame.shape[:2])
    return np.ascontiguousarray(frame[:height, :width])


def _no_stream(error: Exception) -> str:
    return "there are no pictures in it" if isinstance(error, IndexError) else first_line(error)
