"""Batched forward passes for clips that all have the same grid; same weights and results as the stock class.

The stock vision tower runs one attention call for each window, and the stock model reads one question for
each pass over the video. Here all windows of a batch go through one call, and all questions about a clip
share one pass: they follow the video side by side, each blind to the others. `check.py` compares the results
with the unmodified `Qwen2_5_VLForConditionalGeneration`.
"""

import torch
import torch.nn.functional as F
from generate import CELL, FPS, FRAMES, PAIR, SIZE
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

MERGE = 2  # patches a side that become one video token
PATCH = CELL // MERGE  # pixels
GRID = (FRAMES // PAIR, SIZE // PATCH, SIZE // PATCH)  # in patches: time, height, width
SIDE = SIZE // CELL  # video tokens a side
VIDEO_TOKENS = GRID[0] * SIDE * SIDE
SECONDS_PER_GRID = PAIR / FPS
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(frames: torch.Tensor) -> torch.Tensor:
    """RGB in 0..255, [..., 3, H, W], to the float32 range of the processors."""
    mean = torch.tensor(IMAGE_MEAN, device=frames.device)[:, None, None]
    std = torch.tensor(IMAGE_STD, device=frames.device)[:, None, None]
    return (frames.float() / 255 - mean) / std


def patchify(frames: torch.Tensor) -> torch.Tensor:
    """Normalised frames [B, F, 3, H, W] to patches [B, N, 3 * PAIR * PATCH**2] in the processors' order."""
    b, f, c, h, w = frames.shape
    blocks = frames.view(b, f // PAIR, PAIR, c, h // CELL, MERGE, PATCH, w // CELL, MERGE, PATCH)
    blocks = blocks.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return blocks.reshape(b, -1, c * PAIR * PATCH * PATCH)


def _layout(config, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order of one frame pair's video tokens by windows [S], and rotary cos and sin [1, 1, 4 S, head_dim]."""
    span = config.window_size // CELL
    index = torch.arange(SIDE * SIDE, device=device).view(SIDE // span, span, SIDE // span, span)
    order = index.transpose(1, 2).flatten()
    cell = torch.arange(SIDE * SIDE, device=device)[order]
    part = torch.arange(MERGE * MERGE, device=device)
    row = (cell // SIDE * MERGE)[:, None] + part // MERGE
    col = (cell % SIDE * MERGE)[:, None] + part % MERGE
    quarter = config.hidden_size // config.num_heads // 4
    theta = (config.rope_parameters or {}).get("rope_theta", 10000.0)
    speed = theta ** (-torch.arange(quarter, device=device) / quarter)
    angle = torch.cat([row.reshape(-1, 1) * speed, col.reshape(-1, 1) * speed], dim=-1).repeat(1, 2)
    return order, angle.cos()[None, None], angle.sin()[None, None]


def vision_block(blk, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, window: int) -> torch.Tensor:
    """One block on x [frame pairs, patches, hidden]; attention stays inside groups of `window` patches."""
    n, s, e = x.shape
    qkv = blk.attn.qkv(blk.norm1(x)).view(n, s, 3, blk.attn.num_heads, -1)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    q = (q.float() * cos + rotate_half(q.float()) * sin).to(v.dtype)
    k = (k.float() * cos + rotate_half(k.float()) * sin).to(v.dtype)
    heads, dim = q.shape[1], q.shape[3]

    def split(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(n, heads, s // window, window, dim).transpose(1, 2).reshape(-1, heads, window, dim)

    out = F.scaled_dot_product_attention(split(q), split(k), split(v))
    out = out.view(n, s // window, heads, window, dim).permute(0, 1, 3, 2, 4).reshape(n, s, e)
    x = x + blk.attn.proj(out)
    return x + blk.mlp(blk.norm2(x))


def video_features(visual, patches: torch.Tensor) -> torch.Tensor:
    """The vision tower on patches [B, N, P] of clips of grid GRID: video tokens [B, VIDEO_TOKENS, hidden]."""
    config = visual.config
    order, cos, sin = _layout(config, patches.device)
    unit = MERGE * MERGE
    weight = visual.patch_embed.proj.weight.flatten(1)
    x = F.linear(patches.reshape(-1, SIDE * SIDE, unit, patches.shape[-1])[:, order].to(weight.dtype), weight)
    x = x.reshape(-1, SIDE * SIDE * unit, config.hidden_size)
    for i, blk in enumerate(visual.blocks):
        full = i in config.fullatt_block_indexes
        window = SIDE * SIDE * unit if full else (config.window_size // PATCH) ** 2
        x = vision_block(blk, x, cos, sin, window)
    merged = visual.merger(x.reshape(-1, config.hidden_size))
    merged = merged.view(-1, SIDE * SIDE, merged.shape[-1])[:, torch.argsort(order)]
    return merged.reshape(patches.shape[0], VIDEO_TOKENS, -1)


def rope_positions(model: Qwen2_5_VLForConditionalGeneration, prefix: list[int], tail: int) -> torch.Tensor:
    """M-RoPE positions [3, len(prefix) + VIDEO_TOKENS + tail] of one clip, from the model's own rule."""
    video = model.config.video_token_id
    ids = torch.tensor([[*prefix, *[video] * VIDEO_TOKENS, *[0] * tail]])
    positions, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == video).int() * 2,
        video_grid_thw=torch.tensor([GRID]),
        second_per_grid_ts=torch.tensor([SECONDS_PER_GRID]),
    )
    return positions[:, 0]


def packed_hidden(
    model: Qwen2_5_VLForConditionalGeneration,
    video: torch.Tensor,
    prefix: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The segments' last hidden states [B, K, L, hidden] and the video's in the middle [B, V, hidden].

    video: features [B, VIDEO_TOKENS, hidden]; prefix: token ids [P] before them; segments: token ids
    [B, K, L], each a question and its answer right after the video; positions: [3, P + VIDEO_TOKENS + L];
    kept: indices [B, V] of the video tokens that are read (they keep their positions), None for all.
    """
    (b, k, length), p = segments.shape, len(prefix)
    device = segments.device
    positions = positions[:, None].expand(-1, b, -1)
    place = positions[:, :, p : p + VIDEO_TOKENS]
    if kept is not None:
        video = video.gather(1, kept[..., None].expand(-1, -1, video.shape[-1]))
        place = place.gather(2, kept[None].expand(3, -1, -1))
    embed = model.get_input_embeddings()
    text = embed(torch.cat([prefix.expand(b, -1), segments.flatten(1)], dim=1))
    embeds = torch.cat([text[:, :p], video.to(text.dtype), text[:, p:]], dim=1)
    tail = positions[:, :, p + VIDEO_TOKENS :].repeat(1, 1, k)
    positions = torch.cat([positions[:, :, :p], place, tail], dim=2)
    shared = p + video.shape[1]
    group = torch.arange(k * length, device=device) // length
    group = torch.cat([torch.full((shared,), -1, device=device), group])
    step = torch.arange(len(group), device=device)
    mask = (step[:, None] >= step) & ((group == group[:, None]) | (group == -1))
    lm = model.model.language_model
    rotary = lm.rotary_emb(embeds, positions)
    hidden, middle = embeds, embeds
    for i, layer in enumerate(lm.layers):
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
        if i == (len(lm.layers) - 1) // 2:
            middle = hidden[:, p:shared]
    return lm.norm(hidden[:, shared:]).view(b, k, length, -1), middle


@torch.no_grad()
def greedy_answers(
    model: Qwen2_5_VLForConditionalGeneration,
    video: torch.Tensor,
    prefix: list[int],
    prompts: torch.Tensor,
    max_new: int = 160,
) -> list[list[int]]:
    """Greedy answers, without the end token, to prompts [B, L] (equal lengths) about the features video."""
    b, eos = len(prompts), model.generation_config.eos_token_id
    embed, lm = model.get_input_embeddings(), model.model.language_model
    head = torch.tensor(prefix, device=video.device).expand(b, -1)
    embeds = torch.cat([embed(head), video.to(embed.weight.dtype), embed(prompts)], dim=1)
    positions = rope_positions(model, prefix, prompts.shape[1]).to(video.device)[:, None].expand(-1, b, -1)
    cache, answers = DynamicCache(config=model.config.text_config), []
    done = torch.zeros(b, dtype=torch.bool, device=video.device)
    for _ in range(max_new):
        hidden = lm(inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True)
        token = model.lm_head(hidden.last_hidden_state[:, -1]).argmax(-1)
        done |= token == eos
        answers.append(token)
        if done.all():
            break
        embeds = embed(token)[:, None]
        positions = positions.amax(dim=(0, 2), keepdim=True).expand(3, -1, -1) + 1
    rows = torch.stack(answers, dim=1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]
