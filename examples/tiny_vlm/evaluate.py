"""Prompts, greedy answers for many questions at once, and their accuracy."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from fastpath import greedy_answers, normalise, patchify, video_features
from generate import COLOURS, NUMBERS, SHAPES, SIDES, SIZES
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

# the words that depend on the video; digits are seconds
SLOT_WORDS = frozenset((*COLOURS, *SHAPES, *SIZES, *SIDES, *NUMBERS, *"012345678")).union(
    ("straight", "turns", "back", "stops", "stays", "still", "nothing", "10", "12", "14", "16")
)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> tuple[list[int], list[int]]:
    """Token ids of the chat prompt before and after the video's placeholder tokens."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, after = text.split("<|video_pad|>")
    return tokenizer(before).input_ids, tokenizer(after).input_ids


def slots(text: str) -> list[str]:
    """The words of an answer that depend on the video, in order."""
    for mark in ".,:":
        text = text.replace(mark, " ")
    return [word for word in text.split() if word in SLOT_WORDS]


def overlap(a: list, b: list) -> float:
    """Share of places at which two sequences agree, of the longer one's length."""
    return sum(x == y for x, y in zip(a, b)) / max(len(a), len(b), 1)


@torch.no_grad()
def encode_videos(
    model: Qwen2_5_VLForConditionalGeneration, batches: Iterable[torch.Tensor], device: str
) -> torch.Tensor:
    """Video features [clips, VIDEO_TOKENS, hidden] of batches of frames [b, FRAMES, 3, SIZE, SIZE] uint8."""
    visual = model.model.visual
    return torch.cat([video_features(visual, patchify(normalise(f.to(device)))) for f in batches])


def answer_all(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    video: torch.Tensor,
    questions: list[list[str]],
    batch: int = 128,
) -> list[list[list[int]]]:
    """Greedy answers' token ids to `questions[clip]` about the features video [clips, ..], in their order."""
    groups = defaultdict(list)  # one batch has prompts of one length, so nothing needs padding
    for clip, asked in enumerate(questions):
        for place, question in enumerate(asked):
            before, after = prompt_ids(tokenizer, question)
            groups[len(after)].append((clip, place, after))
    answers = [[[] for _ in asked] for asked in questions]
    for group in groups.values():
        for i in range(0, len(group), batch):
            part = group[i : i + batch]
            prompts = torch.tensor([after for _, _, after in part], device=video.device)
            rows = greedy_answers(model, video[[clip for clip, _, _ in part]], before, prompts)
            for (clip, place, _), row in zip(part, rows):
                answers[clip][place] = row
    return answers


def score(answers: list[list[str]], references: list[list[str]]) -> dict[str, float]:
    """Shares in 0..1: answers that are right to the letter, words, and words that depend on the video."""
    pairs = [(a, r) for given, right in zip(answers, references) for a, r in zip(given, right)]
    return {
        "exact": sum(a == r for a, r in pairs) / len(pairs),
        "words": sum(overlap(a.split(), r.split()) for a, r in pairs) / len(pairs),
        "slots": sum(overlap(slots(a), slots(r)) for a, r in pairs) / len(pairs),
    }
