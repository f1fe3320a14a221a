"""Check saved checkpoints on the CPU: the stock class gives the same results, and MP4 files are read as well.

    python check.py --clips 60

compares the batched forward pass of `fastpath.py` with the unmodified transformers classes, then answers all
questions about held-out clips twice: from the rendered frames and from the decoded H.264 files.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from evaluate import answer_all, encode_videos, prompt_ids, score
from fastpath import (
    GRID,
    SECONDS_PER_GRID,
    VIDEO_TOKENS,
    normalise,
    packed_hidden,
    patchify,
    rope_positions,
    video_features,
)
from generate import HELD_OUT_SEED, make_clip, read_mp4, render_scene, write_mp4
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def stock_inputs(model, tokenizer, patches: torch.Tensor, question: str) -> dict[str, torch.Tensor]:
    """Arguments of the stock class's forward and generate for one clip's patches [N, P]."""
    before, after = prompt_ids(tokenizer, question)
    video = model.config.video_token_id
    ids = torch.tensor([[*before, *[video] * VIDEO_TOKENS, *after]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == video).int() * 2,
        "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([GRID]),
        "second_per_grid_ts": torch.tensor([SECONDS_PER_GRID]),
    }


@torch.no_grad()
def compare_with_stock(folder: Path, model, tokenizer, seed: int) -> None:
    """Raise unless patches, logits and greedy answers are the ones that stock transformers gives."""
    scene, pairs = make_clip(seed)
    frames = render_scene(scene)
    patches = patchify(normalise(frames)[None])
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    still = patchify(normalise(frames[:1].expand(2, -1, -1, -1))[None])[0]
    image = processor(frames[0].permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(still, image, rtol=0, atol=1e-5)

    stock = [model(**stock_inputs(model, tokenizer, patches[0], q)).logits[0] for q, _ in pairs]
    before = prompt_ids(tokenizer, "")[0]
    after = [prompt_ids(tokenizer, q)[1] for q, _ in pairs]
    length = max(map(len, after))
    segments = torch.full((1, len(pairs), length), tokenizer.pad_token_id)
    for i, ids in enumerate(after):
        segments[0, i, : len(ids)] = torch.tensor(ids)
    video = video_features(model.model.visual, patches)
    positions = rope_positions(model, before, length)
    hidden, _ = packed_hidden(model, video, torch.tensor(before), segments, positions)
    worst = 0.0
    for i, ids in enumerate(after):
        packed = model.lm_head(hidden[0, i, : len(ids)])
        torch.testing.assert_close(packed, stock[i][-len(ids) :], rtol=1e-3, atol=1e-3)
        worst = max(worst, float((packed - stock[i][-len(ids) :]).abs().max()))
    print(f"{folder.name}: logits differ from the stock class by at most {worst:.1e}")

    inputs = stock_inputs(model, tokenizer, patches[0], pairs[0][0])
    out = model.generate(**inputs, max_new_tokens=160)[0, inputs["input_ids"].shape[1] :].tolist()
    fast = answer_all(model, tokenizer, video, [[pairs[0][0]]])[0][0]
    if out[-1] == tokenizer.eos_token_id:
        out = out[:-1]
    if out != fast:
        raise AssertionError(f"greedy answers differ:\n{tokenizer.decode(out)}\n{tokenizer.decode(fast)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="holds target/ and draft/")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED + 10_000)
    args = parser.parse_args()
    clips = [make_clip(seed) for seed in range(args.seed, args.seed + args.clips)]
    questions = [[q for q, _ in pairs] for _, pairs in clips]
    references = [[a for _, a in pairs] for _, pairs in clips]
    rendered, decoded = [], []
    with tempfile.TemporaryDirectory() as folder:
        for scene, _ in clips:
            rendered.append(render_scene(scene)[None])
            write_mp4(Path(folder) / "clip.mp4", rendered[-1][0])
            decoded.append(read_mp4(Path(folder) / "clip.mp4")[None])
    for name in ("target", "draft"):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.folder / name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.folder / name)
        compare_with_stock(args.folder / name, model, tokenizer, args.seed)
        lengths = [len(tokenizer(a).input_ids) + 1 for row in references for a in row]
        print(f"answers have {min(lengths)} to {max(lengths)} tokens, {np.mean(lengths):.1f} on average")
        for label, frames in (("rendered", rendered), ("decoded MP4", decoded)):
            begun = time.time()
            given = answer_all(model, tokenizer, encode_videos(model, frames, "cpu"), questions, batch=8)
            result = score([tokenizer.batch_decode(rows) for rows in given], references)
            print(f"{name}, {label}, {args.clips} clips: {json.dumps(result)} ({time.time() - begun:.0f} s)")


if __name__ == "__main__":
    main()
