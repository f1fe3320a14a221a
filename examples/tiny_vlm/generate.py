"""Synthetic clips of moving shapes, with questions whose answers can only be read from the video.

A clip is 32 frames of 128x128 pixels at 2 frames a second. Three to five objects (8 colours x 6 shapes x
2 sizes, no colour twice) come in from a side at different seconds, move to a point inside, and go straight
on, turn, turn back, or stop there for the rest of the clip. Everything follows from one integer seed.

    python generate.py --out clips --count 6 --seed 1000000000
"""

import argparse
import json
import random
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 128  # pixels, height and width
FRAMES = 32
FPS = 2
BEAT = 2  # seconds; objects come in and are gone at multiples of it
CELL = 16  # pixels covered by one video token (8-pixel patches, merged 2x2)
PAIR = 2  # frames covered by one video token
MAX_THINGS = 5
HELD_OUT_SEED = 1_000_000_000  # training uses smaller seeds only

COLOURS = {
    "red": (222, 44, 44),
    "green": (48, 184, 66),
    "blue": (58, 86, 236),
    "yellow": (242, 226, 58),
    "purple": (168, 58, 206),
    "cyan": (58, 214, 224),
    "orange": (246, 138, 36),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 9, "large": 15}  # radius in pixels
SIDES = ("left", "right", "top", "bottom")
STAYS = "stays"
NUMBERS = ("zero", "one", "two", "three", "four", "five")

_INWARD = {"left": (1, 0), "right": (-1, 0), "top": (0, 1), "bottom": (0, -1)}
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_SPRITE = 41  # pixels; a sprite's border is empty, so clamped look-ups outside it read zero


@dataclass(frozen=True)
class Thing:
    """One object: it is seen from second `start` until just before second `end` (the last if it stays)."""

    colour: str
    shape: str
    size: str
    enters: str  # one of SIDES
    leaves: str  # one of SIDES, or STAYS
    start: int
    end: int
    path: np.ndarray  # [FRAMES, 2] int, the centre's x and y in pixels; meaningful where it is seen

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What one clip shows; `things` are in the order in which they come in."""

    seed: int
    things: tuple[Thing, ...]
    background: np.ndarray  # [3, 4, 4] float32, a coarse grid of colours in 0..1
    drift: float  # how much the background's brightness swings
    tints: np.ndarray  # [len(things), 3] float32, each object's colour in 0..1


def _walk(rng: random.Random, enters: str, leaves: str, start: int) -> tuple[int, np.ndarray] | None:
    """The second in which the object is gone and its path [FRAMES, 2], or None if no lifetime suits."""
    middle = np.array([rng.randint(36, 92), rng.randint(36, 92)])
    points = [_edge_point(enters, middle), middle]
    if leaves != STAYS:
        points.append(_edge_point(leaves, middle))
    lengths = [float(np.abs(b - a).sum()) for a, b in pairwise(points)]
    total, clip = sum(lengths), FRAMES // FPS
    if leaves == STAYS:
        moving, end = rng.choice((5, 6, 7)), clip
    else:
        # 6 to 13 pixels a frame: slow enough to be seen in several token columns, fast enough to fit
        lives = [s for s in range(2 * BEAT, 6 * BEAT, BEAT) if start + s <= clip and 6 <= total / (FPS * s - 1) <= 13]
        if not lives:
            return None
        life = rng.choice(lives)
        moving, end = FPS * life, start + life
    when = np.concatenate([[0.0], np.cumsum(lengths)]) / total * (moving - 1)
    frame = np.arange(FRAMES) - FPS * start
    path = np.stack([np.interp(frame, when, [p[axis] for p in points]) for axis in (0, 1)], axis=-1)
    return end, np.rint(path).astype(np.int64)


def _edge_point(side: str, middle: np.ndarray) -> np.ndarray:
    x = {"left": 0, "right": SIZE - 1}.get(side, int(middle[0]))
    y = {"top": 0, "bottom": SIZE - 1}.get(side, int(middle[1]))
    return np.array([x, y])


def _seen(thing: Thing) -> np.ndarray:
    """[FRAMES] bool."""
    frame = np.arange(FRAMES)
    return (frame >= FPS * thing.start) & (frame < FPS * thing.end)


def _clear_of(new: Thing, others: list[Thing]) -> bool:
    """Whether `new` never touches the others; touching shapes would make the answer a matter of luck."""
    for old in others:
        both = _seen(new) & _seen(old)
        gap = np.hypot(*(new.path - old.path).T)[both]
        if gap.size and gap.min() < 1.3 * (SIZES[new.size] + SIZES[old.size]):
            return False
    return True


def make_scene(seed: int) -> Scene:
    """The scene of an integer seed."""
    rng = random.Random(seed)
    while True:
        count = rng.randint(3, MAX_THINGS)
        starts = sorted(rng.sample(range(0, 6 * BEAT, BEAT), count))
        colours = rng.sample(list(COLOURS), count)
        things: list[Thing] = []
        for start, colour in zip(starts, colours):
            # drawn once, so that the tries below do not favour small objects and those that stay
            shape, size, leaves = rng.choice(SHAPES), rng.choice(list(SIZES)), rng.choice((*SIDES, STAYS))
            for _ in range(12):
                enters = rng.choice(SIDES)
                walk = _walk(rng, enters, leaves, start)
                if walk is None:
                    continue
                thing = Thing(colour, shape, size, enters, leaves, start, *walk)
                if _clear_of(thing, things):
                    things.append(thing)
                    break
        if len(things) == count:
            break
    grey = np.array([[[rng.uniform(0.12, 0.42) for _ in range(4)] for _ in range(4)]])
    hue = np.array([[[rng.uniform(-0.06, 0.06) for _ in range(4)] for _ in range(4)] for _ in range(3)])
    tints = [[c / 255 + rng.uniform(-0.04, 0.04) for c in COLOURS[t.colour]] for t in things]
    return Scene(
        seed,
        tuple(things),
        (grey + hue).astype(np.float32),
        rng.uniform(0.0, 0.2),
        np.clip(np.array(tints, dtype=np.float32), 0, 1),
    )


# ---------------------------------------------------------------------------------------------- questions


def _outcome(thing: Thing) -> str:
    if thing.leaves == STAYS:
        return "stops and stays until the end"
    if thing.leaves == _OPPOSITE[thing.enters]:
        return f"goes straight on and leaves at the {thing.leaves}"
    if thing.leaves == thing.enters:
        return f"turns back and leaves at the {thing.leaves}"
    return f"turns and leaves at the {thing.leaves}"


def _story(scene: Scene) -> str:
    lines = [f"The video shows {NUMBERS[len(scene.things)]} objects."]
    for t in scene.things:
        lines.append(f"At second {t.start} a {t.name} comes in from the {t.enters}, {_outcome(t)}.")
    return " ".join(lines)


def _places(scene: Scene) -> str:
    lines = [f"All {NUMBERS[len(scene.things)]} objects, in the order in which they come in."]
    for t in scene.things:
        end = "is still there at the end" if t.leaves == STAYS else f"leaves at the {t.leaves} at second {t.end}"
        lines.append(f"The {t.colour} {t.shape} comes in from the {t.enters} at second {t.start} and {end}.")
    return " ".join(lines)


def _backwards(scene: Scene) -> str:
    lines = []
    for i, t in enumerate(reversed(scene.things)):
        opening = "Before it comes" if i else "The last object is"
        lines.append(f"{opening} a {t.name}, which comes in from the {t.enters} at second {t.start}.")
        lines.append(f"It {_outcome(t)}.")
    return " ".join(lines)


def _focus(scene: Scene, index: int) -> str:
    def listed(things: tuple[Thing, ...]) -> str:
        parts = [f"a {t.name} that comes from the {t.enters} at second {t.start}" for t in things]
        return ", then ".join(parts) if parts else "nothing"

    t, count = scene.things[index], NUMBERS[len(scene.things)]
    return (
        f"The {t.colour} object is a {t.size} {t.shape}. "
        f"It comes in from the {t.enters} at second {t.start}, {_outcome(t)}. "
        f"Before it: {listed(scene.things[:index])}. After it: {listed(scene.things[index + 1 :])}. "
        f"So it is number {NUMBERS[index + 1]} of {count}."
    )


def questions_and_answers(scene: Scene) -> list[tuple[str, str]]:
    """Four (question, answer) pairs: story, places, backwards, focus on one object.

    Each question has two wordings; the seed chooses the wording and the object asked about.
    """
    rng = random.Random(f"questions {scene.seed}")
    index = rng.randrange(len(scene.things))
    colour = scene.things[index].colour
    return [
        (rng.choice(("What happens in the video?", "Tell what happens, in order.")), _story(scene)),
        (
            rng.choice(
                (
                    "Where does each object come in and where does it leave?",
                    "List for each object where it comes in and leaves.",
                )
            ),
            _places(scene),
        ),
        (
            rng.choice(("Describe the objects, the last one first.", "Tell it backwards.")),
            _backwards(scene),
        ),
        (
            rng.choice((f"What does the {colour} object do?", f"Describe the {colour} object and what is around it.")),
            _focus(scene, index),
        ),
    ]


def make_clip(seed: int) -> tuple[Scene, list[tuple[str, str]]]:
    """The scene of a seed and its (question, answer) pairs."""
    scene = make_scene(seed)
    return scene, questions_and_answers(scene)


# --------------------------------------------------------------------------------------------- rendering


@cache
def _sprites(device: str) -> torch.Tensor:
    """[len(SHAPES) * len(SIZES), _SPRITE * _SPRITE] float32 coverage in 0..1, shape-major."""
    half = _SPRITE // 2
    y, x = torch.meshgrid(*(torch.arange(-half, half + 1.0),) * 2, indexing="ij")
    ax, ay, radius = x.abs(), y.abs(), torch.hypot(x, y)
    out = []
    for shape in SHAPES:
        for r in SIZES.values():
            inside = {
                "circle": r - radius,
                "square": 0.86 * r - torch.maximum(ax, ay),
                "triangle": torch.minimum((r + y - 1.8 * ax) / 2.06, 0.8 * r - y),
                "diamond": (1.15 * r - ax - ay) / 1.42,
                "cross": torch.minimum(0.34 * r - torch.minimum(ax, ay), r - torch.maximum(ax, ay)),
                "ring": 0.24 * r - (radius - 0.76 * r).abs(),
            }[shape]
            out.append((inside + 0.5).clamp(0, 1).flatten())
    return torch.stack(out).to(device)


def pack_scenes(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """What `render` and the training labels need, as tensors; K = MAX_THINGS, unused slots are never seen.

    path [B, K, FRAMES, 2] int32, seen [B, K, FRAMES] bool, sprite [B, K] int64, tint [B, K, 3] float32,
    background [B, 3, 4, 4] float32, drift [B] float32, kind [B, K, 5] int64 (indices of colour, shape, size,
    side of entry, and the second of entry).
    """
    b, k = len(scenes), MAX_THINGS
    path = np.zeros((b, k, FRAMES, 2), np.int32)
    seen = np.zeros((b, k, FRAMES), bool)
    kind = np.zeros((b, k, 5), np.int64)
    tint = np.zeros((b, k, 3), np.float32)
    colours, sizes = list(COLOURS), list(SIZES)
    for i, scene in enumerate(scenes):
        tint[i, : len(scene.things)] = scene.tints
        for j, t in enumerate(scene.things):
            path[i, j], seen[i, j] = t.path, _seen(t)
            kind[i, j] = (
                colours.index(t.colour),
                SHAPES.index(t.shape),
                sizes.index(t.size),
                SIDES.index(t.enters),
                t.start,
            )
    return {
        "path": torch.from_numpy(path),
        "seen": torch.from_numpy(seen),
        "sprite": torch.from_numpy(kind[..., 1] * len(SIZES) + kind[..., 2]),
        "tint": torch.from_numpy(tint),
        "background": torch.from_numpy(np.stack([s.background for s in scenes])),
        "drift": torch.tensor([s.drift for s in scenes]),
        "kind": torch.from_numpy(kind),
    }


def render_masks(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    """Coverage of every pixel by every object, [B, K, FRAMES, SIZE, SIZE] float32 in 0..1."""
    path, half = packed["path"].long(), _SPRITE // 2
    pixel = torch.arange(SIZE, device=path.device)
    col = (pixel - path[..., :1] + half).clamp(0, _SPRITE - 1)  # [B, K, FRAMES, SIZE]
    row = (pixel - path[..., 1:] + half).clamp(0, _SPRITE - 1)
    row = row * _SPRITE + packed["sprite"][..., None, None] * _SPRITE**2
    index = (row.int()[..., :, None] + col.int()[..., None, :]).flatten()
    masks = _sprites(str(path.device)).flatten().index_select(0, index)
    masks = masks.view(*path.shape[:3], SIZE, SIZE)
    return masks * packed["seen"][..., None, None]


def render(
    packed: dict[str, torch.Tensor], noise: torch.Generator | None = None, masks: torch.Tensor | None = None
) -> torch.Tensor:
    """Frames [B, FRAMES, 3, SIZE, SIZE] uint8 RGB, on the device of `packed`.

    `noise`: a generator on that device for a light pixel noise (a deviation of 2 of 255); None for no noise.
    """
    masks = render_masks(packed) if masks is None else masks
    b, k = masks.shape[:2]
    base = F.interpolate(packed["background"], size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    time = torch.arange(FRAMES, device=masks.device) / FRAMES
    swing = 1 + packed["drift"][:, None] * torch.sin(2 * torch.pi * time)  # [B, FRAMES]
    frames = base[:, None] * swing[:, :, None, None, None]
    flat = masks.view(b, k, -1)
    paint = (packed["tint"].transpose(1, 2) @ flat).view(b, 3, FRAMES, SIZE, SIZE).transpose(1, 2)
    cover = masks.sum(1).clamp_(max=1)[:, :, None]
    frames = frames * (1 - cover) + paint
    if noise is not None:
        frames = frames + torch.randn(frames.shape, generator=noise, device=frames.device) * (2 / 255)
    return (frames * 255).round_().clamp_(0, 255).to(torch.uint8)


def render_scene(scene: Scene) -> torch.Tensor:
    """One clip's frames with its own noise, on the CPU: [FRAMES, 3, SIZE, SIZE] uint8 RGB."""
    return render(pack_scenes([scene]), torch.Generator().manual_seed(scene.seed))[0]


# ------------------------------------------------------------------------------------------- video files


def write_mp4(path: str | Path, frames: torch.Tensor, fps: int = FPS) -> None:
    """Write frames [N, 3, H, W] uint8 RGB as H.264 (yuv420p)."""
    import av  # here, because training renders its clips and needs no video library

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "preset": "medium"}
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_mp4(path: str | Path) -> torch.Tensor:
    """All frames of a video file, [N, 3, H, W] uint8 RGB."""
    import av

    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("clips"))
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="seed of the first clip")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    listing = []
    for i in range(args.count):
        seed = args.seed + i
        scene, pairs = make_clip(seed)
        name = f"clip_{i}.mp4"
        write_mp4(args.out / name, render_scene(scene))
        listing.append({"file": name, "seed": seed, "questions": [{"question": q, "answer": a} for q, a in pairs]})
    (args.out / "clips.json").write_text(json.dumps(listing, indent=2) + "\n")


if __name__ == "__main__":
    main()
