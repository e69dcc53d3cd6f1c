"""Video in and out, frame by frame, so that its length takes no memory.

Frames that are read are turned upright, as the telephone noted it. PyAV is imported only once a video is opened or
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.prediction.photos import first_line


class Video:
    """Frames of a video, uint8 [H, W, 3] each, as they come; `fps`, and `count`, 0 where the file does not say.

    Needs PyAV. Errors: PoseError where it is missing, and for files that are no video.
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
        av = _av()
        try:
            with av.open(str(self.path)) as file:
                file.streams.video[0].thread_type = "AUTO"
                for frame in file.decode(video=0):
                    turns = round(getattr(frame, "rotation", 0) / 90)  # telephones note how they were held
                    yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
        except av.FFmpegError as error:
            raise PoseError(f"{self.path} cannot be read on: {_no_stream(error)}") from error


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Write frames, uint8 [H, W, 3], as H.264 in .mp4, as they come; how many there were.

    The file appears when it is whole. Odd sizes lose their last row or column, which the format has no place for.
    Needs PyAV. Errors: PoseError where it is missing, and where `path` exists, cannot be written or is no .mp4.
    """
    path, av = Path(path), _av()
    if path.suffix.lower() != ".mp4" or path.exists():
        raise PoseError(f"write_video({str(path)!r}): " + ("this file exists" if path.exists() else "name it .mp4"))
    partial = path.with_name(f".{path.stem}.partial.mp4")
    count = 0
    try:
        with av.open(str(partial), "w") as file:
            stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "20"})
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                height, width = (size - size % 2 for size in frame.shape[:2])
                if not count:
                    stream.width, stream.height = width, height
                pixels = np.ascontiguousarray(frame[:height, :width])
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
    return av


def _no_stream(error: Exception) -> str:
    return "there are no pictures in it" if isinstance(error, IndexError) else first_line(error)
