"""select_tokens: SpecVLM's two-stage choice of the video tokens that the draft reads."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import _env
from ..backend import (
    Tier,
    architecture,
    extension,
    multiprocessors,
    register,
    shared_memory,
)
from ..launches import Launch, launched
from ..reference.select_tokens import Selection
from ..reference.select_tokens import select_tokens as reference

OP = register("select_tokens")

Call = tuple[Tensor, int, float, Tensor | None]


def select_tokens(
    scores: Tensor,
    keep: int,
    top_p: float = 0.4,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """Chooses `keep` tokens: first the most attended up to a share of the mass, then the rest spread evenly.

    Stage I takes the m highest scores (ties to the lower index, NaN lowest), m the smallest count whose mass
    reaches top_p of the whole, at most keep. Stage II takes keep-m of the R others, in index order, at ranks
    floor(j*(R-1)/(keep-m-1)). top_p=0 is uniform subsampling, top_p=1 is top-k. Masses are integers of 40 bits
    relative to the row's maximum, so every backend gives bitwise the same tokens.

    Args:
        scores: float32 [B,V] (bf16 and fp16 are widened), from token_scores.
        keep: tokens to keep, 0..V and at most the number of candidates.
        top_p: share of the attention mass for stage I, in [0,1].
        mask: bool [B,V], the candidates; None for all. Rows with fewer than keep candidates end in -1.
        backend: None for the best that supports the call, or "cuda", "triton", "torch".

    Returns:
        Selection(indices int64 [B,keep] ascending, num_attention int32 [B], the number m from stage I).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or range.
        BackendUnavailableError: the named backend cannot run this call.

    Reference: specvlm_kernels.reference.select_tokens. Source: SpecVLM, section 3.2 (two-stage pruning).
    """
    seen = (scores, mask), (keep, top_p, backend), ()
    if outputs := OP.again(seen):
        return Selection(*outputs)
    call = prepare(scores, keep, top_p, mask=mask)
    b = scores.shape[0]
    indices = torch.empty(b, keep, dtype=torch.int64, device=scores.device)
    if not (b and keep):
        return Selection(indices, torch.zeros(b, dtype=torch.int32, device=scores.device))
    num_attention = torch.empty(b, dtype=torch.int32, device=scores.device)
    selection = Selection(indices, num_attention)
    OP.run(call, selection, backend, seen)
    return selection


def prepare(scores: Tensor, keep: int, top_p: float = 0.4, *, mask: Tensor | None = None) -> Call:
    """The checked inputs as the tiers take them: scores in float32."""
    sizes: check.Sizes = {}
    check.tensor("scores", scores, "B V", (torch.float32, *check.HALF), sizes)
    check.integer("keep", keep, 0, sizes["V"])
    top_p = check.real("top_p", top_p, 0, 1)
    if mask is not None:
        check.tensor("mask", mask, "B V", check.BOOL, sizes, scores.device)
        if _env.CHECK and not torch.compiler.is_compiling() and mask.numel():
            fewest = int(mask.sum(-1).min())
            if fewest < keep:
                raise ValueError(f"mask: expected at least keep={keep} candidates in every row, got {fewest}")
    return scores.float(), keep, top_p, mask


def _run(
    scores: Tensor,
    keep: int,
    top_p: float,
    mask: Tensor | None,
    indices: Tensor,
    num_attention: Tensor,
    backend: str | None,
) -> None:
    call = (scores, keep, top_p, mask)
    OP.pick(backend, call[0].device, call)(*call, indices, num_attention)


torch.library.custom_op("specvlm::select_tokens", _run, mutates_args=("indices", "num_attention")).register_fake(
    lambda *_: None
)


def _torch(
    scores: Tensor, keep: int, top_p: float, mask: Tensor | None, indices: Tensor, num_attention: Tensor
) -> None:
    chosen = reference(scores, keep, top_p, mask=mask)
    indices.copy_(chosen.indices)
    num_attention.copy_(chosen.num_attention)


MOST_TOKENS = 1 << 22  # so that masses sum in 64 bits; also in csrc/include/specvlm/select_tokens.h
MOST_CUDA_ROWS = 65535  # the same file


def _too_many_tokens(v: int) -> str | None:
    return None if v <= MOST_TOKENS else f"at most {MOST_TOKENS} tokens a row, so that masses sum in 64 bits, got {v}"


def _cuda_missing(scores: Tensor, *_: object) -> str | None:
    b, v = scores.shape
    return _too_many_tokens(v) or (None if b <= MOST_CUDA_ROWS else f"at most {MOST_CUDA_ROWS} rows in a call, got {b}")


@functools.cache
def _plan(rows: int, tokens: int, architecture: int, index: int | None) -> Any:
    return extension()[0].select_tokens_plan(rows, tokens, architecture, multiprocessors(index), shared_memory(index))


def _cuda(
    scores: Tensor, keep: int, top_p: float, mask: Tensor | None, indices: Tensor, num_attention: Tensor
) -> Launch:
    index = scores.device.index
    b, v = scores.shape
    plan = _plan(b, v, architecture(index), index)
    prepared = extension()[0].SelectTokens(
        plan=plan,
        scores_stride=scores.stride(0),
        mask_stride=mask.stride(0) if mask is not None else 0,
        indices_stride=indices.stride(0),
        rows=b,
        tokens=v,
        keep=keep,
        share={0.0: -2, 1.0: -1}.get(top_p, round(top_p * 2**24)),
    )
    return launched(prepared.launch, 8 * plan.workspace_words, scores, mask, indices, num_attention)


def _triton(*call: Any) -> None:
    from ..triton.select_tokens import select_tokens as kernel

    kernel(*call)


def _triton_missing(scores: Tensor, *_: object) -> str | None:
    return _too_many_tokens(scores.shape[1])


OP.tiers["cuda"] = Tier(missing=_cuda_missing, run=_cuda)
OP.tiers["triton"] = Tier(missing=_triton_missing, run=_triton)
OP.tiers["torch"] = Tier(missing=lambda *_: None, run=_torch)
