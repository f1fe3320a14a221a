"""Runs transformers' own Qwen2_5_VLForConditionalGeneration and LlavaOnevisionForConditionalGeneration.

Nothing of their modelling code is repeated: the language model is called with our attention function, which
transformers' AttentionInterface knows as "specvlm", and with a Cache that writes into one stacked buffer.
Tested with transformers 5.17, 5.18 and 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    Cache,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.cache_utils import CacheLayerMixin

from ..decoding import SpeculativeDecoder
from ..model import KVCache, Prompt, Rating
from ..ops.token_scores import token_scores
from ..ops.tree_attention import tree_attention
from ..passes import PASSES, LeanText

ATTENTION = "specvlm"


@dataclass
class _Pass:
    """What one forward pass tells the attention function and the cache, beside the tensors they are given."""

    cache: KVCache
    slots: Tensor  # int64 [n]: cache positions of the new tokens
    nodes: int  # tree nodes in the cache with this pass's: first + n
    tree_mask: Tensor | None
    fresh: bool
    rating: Rating | None
    layers: int


class _Layer(CacheLayerMixin):
    """One layer of the stacked cache; what it returns is the whole buffer [1,S,Hkv,D], not what is valid of it."""

    def __init__(self, keys: Tensor, values: Tensor, current: _Pass):
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self._pass = current
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(1, self._pass.slots, key_states.transpose(1, 2))
        self.values.index_copy_(1, self._pass.slots, value_states.transpose(1, 2))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return int(self._pass.cache.kv_lens[0])

    def get_max_length(self) -> int:
        return self.keys.shape[1]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    specvlm: _Pass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1,Hq,n,D], keys and values [1,S,Hkv,D]; returns [1,n,Hq,D]."""
    if specvlm is None:
        raise RuntimeError("the specvlm attention runs inside SpeculativeDecoder only")
    n = query.shape[2]
    if specvlm.fresh:  # a prompt from position 0: plain causal attention, for which torch picks flash kernels
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            keys[:, :n].transpose(1, 2),
            values[:, :n].transpose(1, 2),
            is_causal=n > 1,
            scale=scaling,
            enable_gqa=True,
        )
        return out.transpose(1, 2), None
    kv_lens, rating = specvlm.cache.kv_lens, specvlm.rating
    q = query.transpose(1, 2)
    earlier = specvlm.nodes - n
    if earlier:  # nodes of earlier levels are in the cache already: their rows only keep the mask's numbering
        q = torch.nn.functional.pad(q, (0, 0, 0, 0, earlier, 0))
    if rating is None:
        attended = tree_attention(q, keys, values, kv_lens, specvlm.tree_mask, softmax_scale=scaling)
        assert isinstance(attended, Tensor)
        return attended[:, earlier:], None
    out, lse = tree_attention(q, keys, values, kv_lens, specvlm.tree_mask, softmax_scale=scaling, return_lse=True)
    with rating.clock("rating"):
        token_scores(
            q,
            keys,
            lse,
            kv_lens,
            rating.start,
            rating.scores.shape[1],
            weight=1 / specvlm.layers,
            out=rating.scores,
            softmax_scale=scaling,
        )
    return out, None


AttentionInterface.register(ATTENTION, _attention)


@contextmanager
def _specvlm_attention(config: Any) -> Iterator[None]:
    """The model is the user's: its own attention is back after every pass, also after an error."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


class TransformersModel:
    """A transformers vision-language model as `model.Model`; subclasses know what differs per family.

    Prompts are read by transformers' own modules, generated tokens by the variant of `passes.PASSES`.
    """

    def __init__(self, model: PreTrainedModel, passes: str = "eager"):
        if passes not in PASSES:
            raise ValueError(f"passes: expected one of {', '.join(PASSES)}, got {passes!r}")
        self.model: Any = model.eval()
        self.text: Any = model.model.language_model
        config = self.text.config
        layer_types = getattr(config, "layer_types", None) or []
        if "sliding_attention" in layer_types:
            raise ValueError(f"model: {type(model).__name__} with sliding-window layers is not supported")
        self.vocab_size: int = config.vocab_size
        self.stop_tokens = _stop_tokens(model)
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._lean = None if passes == "eager" else LeanText(self.text, self.model.lm_head, passes)

    @property
    def device(self) -> torch.device:
        return self.text.embed_tokens.weight.device

    def _cache_shape(self, capacity: int) -> tuple[int, ...]:
        return self.text.config.num_hidden_layers, 1, capacity, self._kv_heads, self._head_dim

    def cache_bytes(self, capacity: int) -> int:
        return 2 * math.prod(self._cache_shape(capacity)) * self.text.embed_tokens.weight.element_size()

    def prefill_bytes(self, tokens: int) -> int:
        """The widest moment of a layer: the MLP's gate, up and product, beside a few rows of hidden size."""
        config = self.text.config
        row = 3 * config.intermediate_size + 8 * config.hidden_size
        return tokens * row * self.text.embed_tokens.weight.element_size()

    def new_cache(self, capacity: int) -> KVCache:
        shape = self._cache_shape(capacity)
        weight = self.text.embed_tokens.weight
        keys, values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return KVCache(keys, values, torch.zeros(1, dtype=torch.int32, device=weight.device))

    def forward(
        self,
        cache: KVCache,
        tokens: Tensor,
        positions: Tensor,
        *,
        first: int = 0,
        tree_mask: Tensor | None = None,
        fresh: bool = False,
        rating: Rating | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        if self._lean is not None and tokens.dtype == torch.int64:
            return self._lean.forward(cache, tokens, positions, first=first, tree_mask=tree_mask, rows=rows)
        embeds = self.text.embed_tokens(tokens) if tokens.dtype == torch.int64 else tokens
        n = embeds.shape[1]
        slots = cache.kv_lens.long() + torch.arange(first, first + n, device=embeds.device)
        layers = len(cache.keys)
        current = _Pass(cache, slots, first + n, tree_mask, fresh, rating, layers)
        past = Cache(layers=[_Layer(k, v, current) for k, v in zip(cache.keys, cache.values)])
        with _specvlm_attention(self.text.config):
            hidden = self.text(
                inputs_embeds=embeds,
                position_ids=self._position_ids(positions.long()),
                attention_mask={"full_attention": None},  # ours reads the lengths and the tree from `specvlm`
                past_key_values=past,
                use_cache=True,
                specvlm=current,
            ).last_hidden_state
        return self.model.lm_head(hidden if rows is None else hidden[:, rows])

    def embed(self, inputs: Mapping[str, Any]) -> Prompt:
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        ids = inputs.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
            came = "nothing" if ids is None else f"shape {list(ids.shape)}"
            raise ValueError(f"inputs: expected input_ids of shape [1,S], one request at a time, got {came}")
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise ValueError("inputs: expected a prompt without padding (attention_mask all ones)")
        embeds = self.text.embed_tokens(ids)
        config = self.model.config
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for kind, token in (("image", config.image_token_id), ("video", config.video_token_id)):
            here = ids == token
            features = self._features(kind, inputs)
            found = 0 if features is None else features.shape[0]
            if found != int(here.sum()):
                raise ValueError(
                    f"inputs: the prompt holds {int(here.sum())} {kind} tokens, the vision tower gave {found}"
                )
            if features is not None:
                embeds = embeds.masked_scatter(here[..., None], features.to(embeds))
            visual |= here
        positions = self._prompt_positions(inputs)
        return Prompt(embeds, positions, visual[0], int(positions.max()) + 1)

    def _features(self, kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
        """[tokens, hidden] from the vision tower for all images or videos of the prompt, None if there are none."""
        raise NotImplementedError

    def _prompt_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """int64 [axes,1,S]."""
        length = inputs["input_ids"].shape[1]
        return torch.arange(length, device=self.device).expand(1, 1, length)

    def _position_ids(self, positions: Tensor) -> Tensor:
        """As the language model takes them: from [1,n] for generated tokens or [axes,1,n] for a prompt."""
        return positions[0] if positions.dim() == 3 else positions


class Qwen25VL(TransformersModel):
    """Qwen2.5-VL: M-RoPE, positions of three axes."""

    def _features(self, kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
        if kind == "image" and inputs.get("pixel_values") is not None:
            out = self.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        elif kind == "video" and inputs.get("pixel_values_videos") is not None:
            out = self.model.get_video_features(
                inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
            )
        else:
            return None
        return torch.cat(out.pooler_output)

    def _prompt_positions(self, inputs: Mapping[str, Any]) -> Tensor:
        ids = inputs["input_ids"]
        config = self.model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=kinds,
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            second_per_grid_ts=inputs.get("second_per_grid_ts"),
        )
        return positions

    def _position_ids(self, positions: Tensor) -> Tensor:
        return positions if positions.dim() == 3 else positions.expand(3, *positions.shape)


class LlavaOnevision(TransformersModel):
    """LLaVA-OneVision: plain positions."""

    def _features(self, kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
        if kind == "image" and inputs.get("pixel_values") is not None:
            out = self.model.get_image_features(
                inputs["pixel_values"],
                inputs["image_sizes"],
                batch_num_images=inputs.get("batch_num_images"),
                return_dict=True,
            )
            return torch.cat(out.pooler_output)
        if kind == "video" and inputs.get("pixel_values_videos") is not None:
            videos = self.model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
            wanted = int((inputs["input_ids"] == self.model.config.video_token_id).sum())
            if videos.shape[0] * (videos.shape[1] + 1) == wanted:
                # up to 5.17 the newline that ends each video is added by the caller
                newline = self.model.model.image_newline.to(videos).expand(len(videos), 1, -1)
                videos = torch.cat([videos, newline], 1)
            return videos.flatten(0, 1)
        return None


def _stop_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)


def wrap(model: Any, passes: str = "eager") -> TransformersModel:
    """The adapter for a model, by its class."""
    if isinstance(model, TransformersModel):
        return model
    for known, adapter in (
        (Qwen2_5_VLForConditionalGeneration, Qwen25VL),
        (LlavaOnevisionForConditionalGeneration, LlavaOnevision),
    ):
        if isinstance(model, known):
            return adapter(model, passes)
    raise TypeError(
        "model: expected Qwen2_5_VLForConditionalGeneration or LlavaOnevisionForConditionalGeneration, "
        f"got {type(model).__name__}"
    )


def check_tokenizers(tokenizer: Any, draft_tokenizer: Any) -> None:
    """Raises ValueError unless both give the same ids to the same strings, added tokens included."""
    ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    if ours == theirs:
        return
    odd = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    raise ValueError(
        f"draft: its tokenizer is not the target's: {len(odd)} of {len(ours)} entries differ, such as {odd[0]!r} "
        f"({ours.get(odd[0])} in the target, {theirs.get(odd[0])} in the draft)"
    )


def from_transformers(
    target: Any,
    draft: Any,
    *,
    tokenizer: Any = None,
    draft_tokenizer: Any = None,
    passes: str = "eager",
    **options: Any,
) -> SpeculativeDecoder:
    """A SpeculativeDecoder over two transformers models, which stay usable on their own.

    Args:
        target, draft: Qwen2_5_VLForConditionalGeneration or LlavaOnevisionForConditionalGeneration, both of one
            family, with one tokenizer; their vocabularies may be padded differently.
        tokenizer: the target's, for Generation.text.
        draft_tokenizer: if given, checked to be the same.
        passes: how generated tokens run through the models: "eager" (transformers' own modules), or by a lean walk
            over their weights that is compiled ("compile"), made of Triton kernels ("fused"), or of these with a
            Triton matrix product too ("fused-gemm"). All but eager merge the models' projections, see `LeanText`.
        **options: SpeculativeDecoder's tree, pruning, sampling, positions, max_cache_tokens, graphs.

    Raises:
        TypeError: a model of another class. ValueError: models or tokenizers that do not go together.
    """
    models = wrap(target, passes), wrap(draft, passes)
    if type(models[0]) is not type(models[1]):
        raise ValueError(f"draft: expected a {type(target).__name__} as the target is, got {type(draft).__name__}")
    configs = [m.model.config for m in models]
    for name in ("image_token_id", "video_token_id"):
        ids = [getattr(c, name) for c in configs]
        if ids[0] != ids[1]:
            raise ValueError(f"draft: its {name} is {ids[1]}, the target's {ids[0]}: the tokenizers differ")
    if tokenizer is not None and draft_tokenizer is not None:
        check_tokenizers(tokenizer, draft_tokenizer)
    return SpeculativeDecoder(models[0], models[1], tokenizer=tokenizer, **options)
