"""Frames of a video file, decoded with PyAV and sampled evenly, with one clear sentence when that cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


class VideoError(ValueError):
    """A video that cannot be read; the message is one sentence for the user."""


@dataclass
class Video:
    """frames uint8 [F,H,W,3] RGB; fps: frames a second after sampling."""

    frames: np.ndarray
    fps: float


def read_video(path: str | Path, fps: float = 2.0, max_frames: int = 768, multiple: int = 2) -> Video:
    """Reads a video's first picture stream.

    Args:
        path: any file that FFmpeg decodes.
        fps: frames a second to keep, evenly spaced; all frames when the file has no more.
        max_frames: at most so many.
        multiple: keep a multiple of so many frames where there are enough (the vision tower merges pairs).

    Raises:
        VideoError: the file is missing, empty, truncated, holds no pictures or cannot be decoded.
        ValueError: fps or max_frames out of range.
    """
    import av

    if not fps > 0:
        raise ValueError(f"fps: expected a rate above 0, got {fps}")
    if max_frames < multiple:
        raise ValueError(f"max_frames: expected at least {multiple}, got {max_frames}")
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: the file holds no video stream")
            stream = container.streams.video[0]
            declared, rate = stream.frames, stream.average_rate or stream.guessed_rate
            if not rate:
                raise VideoError(f"{path}: the video stream declares no frame rate")
            step = max(float(rate) / fps, 1.0)
            kept: list[np.ndarray] = []
            count = 0
            for frame in container.decode(stream):
                if count >= round(len(kept) * step):
                    kept.append(frame.to_ndarray(format="rgb24"))
                count += 1
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{path}: the video cannot be decoded, it is damaged or truncated ({error.strerror})"
        ) from error
    if count == 0:
        raise VideoError(f"{path}: the video stream holds no frames")
    if declared and count < declared:
        raise VideoError(f"{path}: the video is truncated, {count} of {declared} frames could be decoded")
    rate_kept = float(rate) / step
    if len(kept) > max_frames:
        rate_kept *= max_frames / len(kept)
        kept = [kept[i * len(kept) // max_frames] for i in range(max_frames)]
    if len(kept) > multiple:
        kept = kept[: len(kept) // multiple * multiple]
    return Video(np.stack(kept), rate_kept)
