"""Models of the published sizes with random weights, made on the device: real transformers classes, no download.

Sizes are those of the checkpoints' config.json. The vision towers are one small layer: the benchmark starts after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)


@dataclass(frozen=True)
class Size:
    """A text model's shape."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's matrix products."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.hidden * (qkv + self.hidden + 3 * self.intermediate)

    def pass_bytes(self, context: int, item: int = 2) -> int:
        """What a decoding pass has to read: weights without the embedding, and the context's keys and values."""
        weights = self.layers * self.layer_weights + self.hidden * self.vocab
        return item * (weights + 2 * self.layers * context * self.kv_heads * self.head_dim)

    def products(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the merged matrix products of a pass."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (qkv, self.hidden),
            "out": (self.hidden, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "lm_head": (self.vocab, self.hidden),
        }


SIZES = {
    "Qwen2.5-VL-32B": Size("qwen", 5120, 64, 40, 8, 27_648, 152_064, False),
    "Qwen2.5-VL-7B": Size("qwen", 3584, 28, 28, 4, 18_944, 152_064, False),
    "Qwen2.5-VL-3B": Size("qwen", 2048, 36, 16, 2, 11_008, 151_936, True),
    "LLaVA-OneVision-7B": Size("llava", 3584, 28, 28, 4, 18_944, 152_064, False),
    "LLaVA-OneVision-0.5B": Size("llava", 896, 24, 14, 2, 4864, 152_000, True),
    "tiny Qwen2.5-VL": Size("qwen", 64, 2, 4, 2, 128, 320, False),
    "tiny LLaVA-OneVision": Size("llava", 64, 2, 4, 2, 128, 320, True),
}


def config_of(size: Size) -> Any:
    text: dict[str, Any] = dict(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocab,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-6,
        tie_word_embeddings=size.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    tokens = [size.vocab - i for i in range(1, 5)]
    if size.family == "qwen":
        half = size.head_dim // 2
        vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=size.hidden)
        return Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope | {"mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}},
            vision_config=vision | {"fullatt_block_indexes": [0]},
            tie_word_embeddings=size.tied,
            image_token_id=tokens[0],
            video_token_id=tokens[1],
            vision_start_token_id=tokens[2],
            vision_end_token_id=tokens[3],
        )
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(
        text_config=text | {"model_type": "qwen2", "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=size.tied,
        image_token_index=tokens[0],
        video_token_index=tokens[1],
    )


def build(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model with random weights that were never anywhere but on the device."""
    size = SIZES[name]
    config = config_of(size)
    kind = Qwen2_5_VLForConditionalGeneration if size.family == "qwen" else LlavaOnevisionForConditionalGeneration
    with torch.device("meta"):
        model = kind(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    model.tie_weights()
    text = model.model.language_model
    text.rotary_emb = type(text.rotary_emb)(text.config).to(device)  # its buffers came from meta too
    generator = torch.Generator(device).manual_seed(0)
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02, generator=generator)
    model.generation_config.eos_token_id = None
    return model
