"""Tiny random-weight models of both families, with their inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

VOCAB, IMAGE, VIDEO, START, END = 200, 190, 191, 192, 193


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights wide enough that attention and logits differ from token to token."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.generation_config.eos_token_id = None
    return model.eval()


def qwen(seed: int, heads: int = 4, kv_heads: int = 2, layers: int = 3, vocab: int = VOCAB):
    torch.manual_seed(seed)
    hidden = 16 * heads
    text = dict(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        intermediate_size=2 * hidden,
        vocab_size=vocab,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=64,
        out_hidden_size=hidden,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=32,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return _spread(Qwen2_5_VLForConditionalGeneration(config))


def llava(seed: int, heads: int = 4, kv_heads: int = 2, layers: int = 3, vocab: int = VOCAB):
    torch.manual_seed(seed)
    hidden = 16 * heads
    text = dict(
        model_type="qwen2",
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        intermediate_size=2 * hidden,
        vocab_size=vocab,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[32, 32]],
    )
    return _spread(LlavaOnevisionForConditionalGeneration(config))


def text_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, IMAGE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def qwen_inputs(seed: int, videos: int = 1, images: int = 0, text: int = 12) -> dict[str, Tensor]:
    """Videos of 4x4x4 tokens (8 frames of 64x64) and images of 2x4 tokens, text between and after."""
    g = torch.Generator().manual_seed(seed)
    ids = text_tokens(3, seed)
    for i in range(videos):
        ids += [START, *[VIDEO] * 64, END, *text_tokens(2, seed + i)]
    for i in range(images):
        ids += [START, *[IMAGE] * 8, END, *text_tokens(2, seed + i + 9)]
    ids += text_tokens(text, seed + 1)
    out = {"input_ids": torch.tensor([ids])}
    if videos:
        out["video_grid_thw"] = torch.tensor([[4, 8, 8]] * videos)
        out["pixel_values_videos"] = torch.randn(videos * 256, 3 * 2 * 64, generator=g)
        out["second_per_grid_ts"] = torch.tensor([0.5] * videos)
    if images:
        out["image_grid_thw"] = torch.tensor([[1, 4, 8]] * images)
        out["pixel_values"] = torch.randn(images * 32, 3 * 2 * 64, generator=g)
    return _finish(out)


def llava_inputs(seed: int, frames: int = 12, text: int = 12) -> dict[str, Tensor]:
    """One video of `frames` frames, 4 tokens each and a newline."""
    g = torch.Generator().manual_seed(seed)
    ids = [*text_tokens(3, seed), *[VIDEO] * (4 * frames + 1), *text_tokens(text, seed + 1)]
    pixels = torch.randn(1, frames, 3, 32, 32, generator=g)
    return _finish({"input_ids": torch.tensor([ids]), "pixel_values_videos": pixels})


def _finish(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    inputs["attention_mask"] = torch.ones_like(ids)
    if "pixel_values" in inputs or "video_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = ((ids == IMAGE).int() + 2 * (ids == VIDEO).int()).int()
    return inputs


def greedy(model, inputs: dict[str, Tensor], count: int) -> list[int]:
    """What transformers' own generate says."""
    out = model.generate(**inputs, do_sample=False, max_new_tokens=count)
    return out[0, inputs["input_ids"].shape[1] :].tolist()
