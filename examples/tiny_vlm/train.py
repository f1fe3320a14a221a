"""Train the tiny target and draft on one GPU; clips are rendered on the GPU while training runs.

    python train.py --out .

writes `target/`, `draft/` and `train.log` into the output folder.
"""

import argparse
import json
import math
import time
from pathlib import Path

import fastpath
import torch
import torch.nn.functional as F
from build_tokenizer import build_tokenizer, save_tokenizer
from evaluate import SLOT_WORDS, answer_all, encode_videos, prompt_ids, score
from fastpath import VIDEO_TOKENS, normalise, packed_hidden, patchify, rope_positions, video_features
from generate import (
    CELL,
    COLOURS,
    FPS,
    FRAMES,
    HELD_OUT_SEED,
    PAIR,
    SHAPES,
    SIDES,
    SIZES,
    make_clip,
    make_scene,
    pack_scenes,
    questions_and_answers,
    render,
    render_masks,
)
from models import build_config, build_generation_config, save_processors
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2_5_VLForConditionalGeneration

SEGMENT = 168  # tokens; the longest question with its answer has 163
QUESTIONS = 4
SEED = 0
VISION_CLASSES = (1 + len(COLOURS), 1 + len(SHAPES), 1 + len(SIZES), 6)  # class 0 is "no object"
MIDDLE_CLASSES = (FRAMES // FPS, FRAMES // FPS, len(SIDES))


class Clips(Dataset):
    """Item i is the i-th batch: packed scenes, and the segments' ids and answer marks [B, 4, SEGMENT]."""

    def __init__(self, tokenizer, batch: int, steps: int, first_seed: int):
        self.tokenizer, self.batch, self.steps, self.first_seed = tokenizer, batch, steps, first_seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        seed = self.first_seed + step * self.batch
        scenes = [make_scene(s) for s in range(seed, seed + self.batch)]
        ids = torch.full((self.batch, QUESTIONS, SEGMENT), self.tokenizer.pad_token_id, dtype=torch.int32)
        marks = torch.zeros(ids.shape, dtype=torch.bool)
        for i, scene in enumerate(scenes):
            for j, (question, answer) in enumerate(questions_and_answers(scene)):
                start = prompt_ids(self.tokenizer, question)[1]
                reply = [*self.tokenizer(answer).input_ids, self.tokenizer.eos_token_id]
                ids[i, j, : len(start) + len(reply)] = torch.tensor(start + reply)
                marks[i, j, len(start) : len(start) + len(reply)] = True
        return {**pack_scenes(scenes), "ids": ids, "marks": marks}


def augment(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What H.264 does to frames [B, F, 3, H, W] uint8, roughly: blurred colour, a softer picture, noise."""
    b, f, _, h, w = frames.shape
    x = frames.float().flatten(0, 1)
    share = torch.rand(3, b, generator=generator, device=x.device).repeat_interleave(f, 1)[..., None, None, None]
    luma = (x * torch.tensor([0.299, 0.587, 0.114], device=x.device)[:, None, None]).sum(1, keepdim=True)
    colour = x - luma
    coarse = F.interpolate(F.avg_pool2d(colour, 2), size=(h, w), mode="bilinear")
    colour = torch.where(share[0] < 0.6, coarse, colour)
    soft = F.avg_pool2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), 3, 1)
    luma = torch.lerp(luma, soft, (share[1] - 0.4).clamp(min=0))
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return (luma + colour + noise * share[2] * 4).clamp_(0, 255).view(frames.shape)


def labels(batch: dict[str, torch.Tensor], masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each video token shows, as classes of VISION_CLASSES [B, N, 4] and MIDDLE_CLASSES [B, N, 3].

    Also [B, N] bool: whether it shows an object at all (one that covers 6% of it or more).
    """
    b, k = masks.shape[:2]
    cover = F.avg_pool3d(masks, (PAIR, CELL, CELL)).view(b, k, -1)  # [B, K, N]
    share, slot = cover.max(1)
    content = share > 0.06
    shift = batch["path"][:, :, 1::PAIR] - batch["path"][:, :, ::PAIR]  # [B, K, pairs, 2]
    dx, dy = shift.unbind(-1)
    sideways = torch.where(dx > 0, 1, 2)
    upright = torch.where(dy > 0, 3, 4)
    motion = torch.where(dx.abs() >= dy.abs(), sideways, upright)
    motion = torch.where((dx == 0) & (dy == 0), 0, motion)
    motion = motion.repeat_interleave(cover.shape[-1] // motion.shape[-1], dim=2)
    kind = batch["kind"].gather(1, slot[..., None].expand(-1, -1, 5))  # [B, N, 5]
    moves = motion.gather(1, slot[:, None])[:, 0]
    seen = torch.cat([kind[..., :3], moves[..., None]], dim=-1) + 1
    now = torch.arange(FRAMES // PAIR, device=masks.device) * PAIR // FPS
    now = now.repeat_interleave(VIDEO_TOKENS // len(now)).expand(b, -1)
    return seen * content[..., None], torch.stack([now, kind[..., 4], kind[..., 3]], dim=-1), content


def class_loss(logits: torch.Tensor, classes: torch.Tensor, counts: tuple[int, ...], weight: torch.Tensor):
    """Mean over the heads of weighted cross entropy; logits [B, N, sum(counts)], classes [B, N, heads]."""
    losses = 0.0
    for head, target in zip(logits.float().split(counts, dim=-1), classes.unbind(-1)):
        each = F.cross_entropy(head.flatten(0, 1), target.flatten(), reduction="none")
        losses = losses + (each * weight.flatten()).sum() / weight.sum()
    return losses / len(counts)


def choose_tokens(content: torch.Tensor, generator: torch.Generator, cpu: torch.Generator):
    """Indices [B, V] of the video tokens that the draft may read in this batch, or None for all of them.

    Half of the batches keep all. The others keep 5 to 100%: at random, or (every second time) with objects
    preferred, as pruning by the target's attention will do.
    """
    if torch.rand((), generator=cpu) < 0.5:
        return None
    count = max(8, int((0.05 + 0.95 * torch.rand((), generator=cpu) ** 2) * VIDEO_TOKENS) // 8 * 8)
    rank = torch.rand(content.shape, generator=generator, device=content.device)
    if torch.rand((), generator=cpu) < 0.5:
        rank = rank + 0.7 * content
    return rank.topk(count, dim=1).indices.sort(dim=1).values


def train(name: str, tokenizer, args, log, teacher=None) -> Qwen2_5_VLForConditionalGeneration:
    """Train one model; with a teacher, half of the answer loss is the distance to its distribution."""
    device, steps = args.device, args.draft_steps if teacher else args.steps
    torch.manual_seed(SEED)
    model = Qwen2_5_VLForConditionalGeneration(build_config(name, tokenizer)).to(device)
    model.generation_config = build_generation_config(tokenizer)
    width = model.config.text_config.hidden_size
    # dense side tasks on the video tokens, used in training only: without them most of the time goes into
    # finding out that the video matters
    see = torch.nn.Linear(width, sum(VISION_CLASSES), device=device)
    track = torch.nn.Linear(width, sum(MIDDLE_CLASSES), device=device)
    parameters = [*model.parameters(), *see.parameters(), *track.parameters()]
    peak = 2e-3 if teacher else 1e-3
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02, fused=device == "cuda")

    def pace(step: int) -> float:
        return min(1, (step + 1) / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, pace)
    prefix = prompt_ids(tokenizer, "")[0]
    positions = rope_positions(model, prefix, SEGMENT).to(device)
    prefix = torch.tensor(prefix, device=device)
    slot_ids = {i for t, i in tokenizer.get_vocab().items() if tokenizer.decode([i]).strip() in SLOT_WORDS}
    is_slot = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
    is_slot[list(slot_ids)] = True
    is_slot = is_slot.to(device)
    if args.compile and not teacher:  # the draft reads a varying number of tokens: a compilation for each
        for layer in model.model.language_model.layers:
            layer.compile()
    clips = Clips(tokenizer, args.batch, steps, HELD_OUT_SEED // 2 if teacher else 0)
    loader = DataLoader(clips, batch_size=None, num_workers=args.workers, prefetch_factor=4 if args.workers else None)
    generator = torch.Generator(device).manual_seed(SEED)
    cpu = torch.Generator().manual_seed(SEED)
    size = sum(p.numel() for p in model.parameters())
    log(f"{name}: {size / 1e6:.2f} M parameters, {steps} steps of {args.batch} clips x {QUESTIONS} questions")
    begun, totals = time.time(), torch.zeros(5, device=device)
    for step, batch in enumerate(loader):
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with torch.no_grad():
            masks = render_masks(batch)
            classes, tracks, content = labels(batch, masks)
            frames = augment(render(batch, generator, masks), generator)
            patches = patchify(normalise(frames))
            del masks, frames
        kept = choose_tokens(content, generator, cpu) if teacher else None
        ids, marks = batch["ids"].long(), batch["marks"]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            video = video_features(model.model.visual, patches)
            hidden, middle = packed_hidden(model, video, prefix, ids, positions, kept)
            chosen = marks[:, :, 1:]
            logits = model.lm_head(hidden[:, :, :-1][chosen]).float()
            answers = ids[:, :, 1:][chosen]
            loss = answer = F.cross_entropy(logits, answers)
            if teacher:
                with torch.no_grad():
                    seen = video_features(teacher.model.visual, patches)
                    known = packed_hidden(teacher, seen, prefix, ids, positions)[0]
                    wanted = teacher.lm_head(known[:, :, :-1][chosen]).float().softmax(-1)
                loss = 0.5 * answer + 0.5 * F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
            vision = class_loss(see(video), classes, VISION_CLASSES, 0.03 + content.float())
            if kept is not None:
                tracks = tracks.gather(1, kept[..., None].expand(-1, -1, tracks.shape[-1]))
                content = content.gather(1, kept)
            tracking = class_loss(track(middle), tracks, MIDDLE_CLASSES, 1e-6 + content.float())
        (loss + 0.5 * vision + 0.3 * tracking).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        with torch.no_grad():
            right, slot = logits.argmax(-1) == answers, is_slot[answers]
            part = right[slot].float().mean()
            totals += torch.stack([answer, vision, tracking, right.float().mean(), part]).detach()
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            n = (step % args.log_every) + 1
            a, v, t, r, s = (totals / n).tolist()
            totals.zero_()
            log(
                f"{name} step {step + 1} answer {a:.4f} see {v:.4f} track {t:.4f} "
                f"tokens {r:.4f} slots {s:.4f} seconds {time.time() - begun:.1f}"
            )
    return model


@torch.no_grad()
def held_out(folder: Path, tokenizer, args, log) -> None:
    """Accuracy of a saved checkpoint in float32 on rendered clips of seeds never trained on."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(args.device)
    clips = [make_clip(s) for s in range(HELD_OUT_SEED, HELD_OUT_SEED + args.eval_clips)]
    generator = torch.Generator(args.device).manual_seed(SEED)

    def batches():
        for i in range(0, len(clips), 32):
            packed = pack_scenes([scene for scene, _ in clips[i : i + 32]])
            yield render({key: value.to(args.device) for key, value in packed.items()}, generator)

    video = encode_videos(model, batches(), args.device)
    given = answer_all(model, tokenizer, video, [[q for q, _ in pairs] for _, pairs in clips])
    texts = [tokenizer.batch_decode(rows) for rows in given]
    references = [[a for _, a in pairs] for _, pairs in clips]
    log(f"{folder.name} held out, {len(clips)} clips: {json.dumps(score(texts, references))}")
    for kind, label in enumerate(("story", "places", "backwards", "focus")):
        result = score([[t[kind]] for t in texts], [[r[kind]] for r in references])
        log(f"{folder.name} held out, {label}: {json.dumps(result)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=4000, help="of the target")
    parser.add_argument("--draft-steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=48, help="clips a step")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--eval-clips", type=int, default=256)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    folders = [args.out / "target", args.out / "draft"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    with open(args.out / "train.log", "w", buffering=1) as file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=file)

        gpu = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        log(f"{gpu}, torch {torch.__version__}, seed {SEED}")
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # every layer and precision is a variant
            fastpath.vision_block = torch.compile(fastpath.vision_block)
        tokenizer = build_tokenizer()
        save_tokenizer(tokenizer, *folders)
        save_processors(*folders)
        teacher = None
        for folder in folders:
            model = train(folder.name, tokenizer, args, log, teacher)
            model.to(torch.bfloat16).save_pretrained(folder)
            with torch.compiler.set_stance("force_eager"):
                held_out(folder, tokenizer, args, log)
            teacher = model.requires_grad_(False)
        log(f"seconds in all {time.time() - begun:.1f}")


if __name__ == "__main__":
    main()
