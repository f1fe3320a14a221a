"""From frames and a question to a model's inputs, through transformers' own processors.

AutoProcessor does it where torchvision is installed. Without it there is a path for Qwen2.5-VL: its image processor
(which needs only PIL) cuts each frame into patches, and pairs of frames are put together here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..video import Video


@dataclass
class VideoPrompt:
    """inputs: for the model and SpeculativeDecoder; grid: video tokens as (time, height, width); first: prompt index
    of the first video token."""

    inputs: dict[str, Any]
    grid: tuple[int, int, int]
    first: int


class VideoQuestion:
    """Makes prompts of one video and one question for a model.

    Args:
        folder: a checkpoint folder or hub name, as transformers takes it.

    Raises:
        OSError: no such checkpoint. ImportError: the model's processor needs a package that is not installed.
    """

    def __init__(self, folder: str | Path):
        from transformers import AutoConfig, AutoProcessor, AutoTokenizer

        self.folder = str(folder)
        self.config: Any = AutoConfig.from_pretrained(self.folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        self.processor: Any = None
        try:
            self.processor = AutoProcessor.from_pretrained(self.folder)
        except ImportError:
            if self.config.model_type != "qwen2_5_vl":
                raise
        if not hasattr(self.processor, "video_processor"):
            self.processor = None
        self.fps, self.max_frames = self._sampling()

    def _sampling(self) -> tuple[float, int]:
        """Frames a second and most frames, from the checkpoint; 2 and 768 are Qwen2.5-VL's."""
        settings = self._json("video_preprocessor_config.json")
        return float(settings.get("fps") or 2.0), int(settings.get("max_frames") or 768)

    def _json(self, name: str) -> Mapping[str, Any]:
        from transformers.utils import cached_file

        path = cached_file(self.folder, name, _raise_exceptions_for_missing_entries=False)
        if path is None:
            return {}
        return json.loads(Path(path).read_text())

    def __call__(self, video: Video, question: str) -> VideoPrompt:
        """The inputs for "video, then question" in the model's chat format."""
        if not question.strip():
            raise ValueError("question: expected some text, got nothing")
        content = [{"type": "video"}, {"type": "text", "text": question}]
        template = self.processor or self.tokenizer
        text = template.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = self._with_processor(video, text) if self.processor else self._by_hand(video, text)
        where = (inputs["input_ids"][0] == self.config.video_token_id).nonzero()[:, 0]
        return VideoPrompt(inputs, self._grid(inputs, len(video.frames), len(where)), int(where[0]))

    def _grid(self, inputs: Mapping[str, Any], frames: int, tokens: int) -> tuple[int, int, int]:
        if "video_grid_thw" in inputs:
            t, h, w = inputs["video_grid_thw"][0].tolist()
            merge = self.config.vision_config.spatial_merge_size
            return t, h // merge, w // merge
        side = round((tokens // frames) ** 0.5)  # LLaVA-OneVision: square frames, then one newline token
        return frames, side, side

    def _with_processor(self, video: Video, text: str) -> dict[str, Any]:
        n = len(video.frames)
        metadata = {
            "fps": video.fps,
            "total_num_frames": n,
            "frames_indices": list(range(n)),
            "duration": n / video.fps,
        }
        return dict(
            self.processor(
                text=[text],
                videos=[video.frames],
                video_metadata=[metadata],
                do_sample_frames=False,
                return_tensors="pt",
            )
        )

    def _by_hand(self, video: Video, text: str) -> dict[str, Any]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        settings = self._json("video_preprocessor_config.json") or self._json("preprocessor_config.json")
        names = ("size", "min_pixels", "max_pixels", "patch_size", "merge_size", "image_mean", "image_std")
        processor = Qwen2VLImageProcessorPil(**{name: settings[name] for name in names if settings.get(name)})
        frames = list(video.frames)
        if len(frames) % 2:
            frames.append(frames[-1])
        encoded = processor(images=[np.ascontiguousarray(f) for f in frames], return_tensors="pt")
        _, height, width = encoded["image_grid_thw"][0].tolist()
        pixels = pair_frames(encoded["pixel_values"], len(frames), processor.patch_size)
        grid = torch.tensor([[len(frames) // 2, height, width]])
        tokens = int(grid.prod()) // processor.merge_size**2
        pad = self.tokenizer.convert_ids_to_tokens(self.config.video_token_id)
        encoded_text = self.tokenizer([text.replace(pad, pad * tokens)], return_tensors="pt")
        ids = encoded_text["input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.config.video_token_id).int() * 2,
            "pixel_values_videos": pixels,
            "video_grid_thw": grid,
            "second_per_grid_ts": torch.tensor([2 / video.fps]),
        }


def pair_frames(patches: Tensor, frames: int, patch_size: int) -> Tensor:
    """Video patches [F/2*n, 3*2*p*p] from image patches [F*n, 3*2*p*p], in which each frame stands twice."""
    single = patches.view(frames // 2, 2, -1, 3, 2, patch_size * patch_size)
    paired = torch.stack([single[:, 0, :, :, 0], single[:, 1, :, :, 1]], dim=3)
    return paired.reshape(-1, 3 * 2 * patch_size * patch_size)
