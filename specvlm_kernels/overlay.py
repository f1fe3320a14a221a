"""A picture of what the draft reads: the frames, dimmed, with the kept tokens lit."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

STAGE1, STAGE2 = (255, 140, 0), (70, 160, 255)  # most attended, and spread evenly


def stage_one(kept: Tensor, scores: Tensor, num_attention: int) -> Tensor:
    """bool [keep]: which kept tokens stage I took, the num_attention highest scores with ties to the lower index.

    kept int64 [keep] ascending and scores float32 [V] count from the same token.
    """
    order = scores[kept].sort(descending=True, stable=True).indices[:num_attention]
    mask = torch.zeros(len(kept), dtype=torch.bool, device=kept.device)
    mask[order] = True
    return mask


def draw(
    frames: np.ndarray,
    grid: tuple[int, int, int],
    kept: Tensor,
    first_stage: Tensor,
    *,
    cell: int = 24,
    max_tiles: int = 24,
) -> Image.Image:
    """An image of the video's token grid.

    Args:
        frames: uint8 [F,H,W,3].
        grid: video tokens as (time, height, width); one tile per time step, F/time frames each.
        kept: int64 [keep], kept video tokens counted from the first one.
        first_stage: bool [keep], which of them are stage I's.
        cell: pixels of a token in the picture.
        max_tiles: at most so many time steps are drawn, evenly spread.
    """
    t, h, w = grid
    shown = [i * t // min(t, max_tiles) for i in range(min(t, max_tiles))]
    columns = min(len(shown), 6)
    rows = -(-len(shown) // columns)
    gap, legend = 6, 22
    tile_w, tile_h = w * cell, h * cell
    size = (columns * (tile_w + gap) + gap, rows * (tile_h + gap) + gap + legend)
    picture = Image.new("RGB", size, (20, 20, 24))
    pen = ImageDraw.Draw(picture)
    stages = {int(i): bool(s) for i, s in zip(kept.tolist(), first_stage.tolist())}
    for place, step in enumerate(shown):
        left = gap + place % columns * (tile_w + gap)
        top = gap + place // columns * (tile_h + gap)
        frame = Image.fromarray(frames[min(step * len(frames) // t, len(frames) - 1)]).resize((tile_w, tile_h))
        picture.paste(frame.point(lambda value: value * 0.3), (left, top))
        for token in range(step * h * w, (step + 1) * h * w):
            if token in stages:
                y, x = divmod(token - step * h * w, w)
                box = (x * cell, y * cell, (x + 1) * cell, (y + 1) * cell)
                picture.paste(frame.crop(box), (left + box[0], top + box[1]))
                edges = (left + box[0], top + box[1], left + box[2] - 1, top + box[3] - 1)
                pen.rectangle(edges, outline=STAGE1 if stages[token] else STAGE2, width=2)
    count = sum(stages.values())
    y = size[1] - legend + 2
    pen.text((gap, y), f"stage I, most attended: {count}", fill=STAGE1)
    pen.text((gap + 180, y), f"stage II, spread evenly: {len(stages) - count}", fill=STAGE2)
    pen.text((gap + 370, y), f"of {t * h * w} video tokens", fill=(200, 200, 200))
    return picture
