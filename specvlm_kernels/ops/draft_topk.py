"""draft_topk: the draft's k most likely next tokens, in one pass over the logits."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..backend import (
    Tier,
    extension,
    logits_type,
    not_for_cuda_logits,
    not_for_triton,
    register,
    rows_aligned,
)
from ..launches import Launch, launched
from ..reference.draft_topk import draft_topk as reference

OP = register("draft_topk")

Call = tuple[Tensor, int, float]


def draft_topk(
    logits: Tensor, k: int, *, temperature: float = 1.0, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of every row, with their log-probabilities over the whole vocabulary.

    Args:
        logits: [...,vocab] bf16, fp16 or fp32; NaN counts as -inf.
        k: 1..vocab.
        temperature: divides the logits before the softmax; above 0.
        backend: None for the best that supports the call, or "cuda", "triton", "torch".

    Returns:
        (log_probs float32 [...,k], token_ids int64 [...,k]), descending by logit, ties to the lower id.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or range.
        BackendUnavailableError: the named backend cannot run this call.

    Reference: specvlm_kernels.reference.draft_topk. Source: SpecVLM, section 3.3 (draft tree).
    """
    seen = (logits,), (k, temperature, backend), ()
    if outputs := OP.again(seen):
        return tuple(outputs)  # type: ignore[return-value]
    call = prepare(logits, k, temperature=temperature)
    shape = (*logits.shape[:-1], k)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs = torch.empty(shape, dtype=dtype, device=logits.device)
    token_ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    if call[0].shape[0]:
        OP.run(call, (log_probs, token_ids), backend, seen)
    return log_probs, token_ids


def prepare(logits: Tensor, k: int, *, temperature: float = 1.0) -> Call:
    """The checked inputs as the tiers take them: logits as rows [R,vocab]."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a torch.Tensor, got {type(logits).__name__}")
    if logits.dim() == 0:
        raise ValueError("logits: expected shape [..., vocab], got a scalar")
    vocab = logits.shape[-1]
    rows = logits.reshape(logits.shape[:-1].numel(), vocab)
    check.tensor("logits", rows, "rows vocab", check.FLOATS, {})
    check.integer("k", k, 1, vocab)
    return rows, k, check.real("temperature", temperature, 0, low_open=True)


def _run(logits: Tensor, k: int, temperature: float, log_probs: Tensor, token_ids: Tensor, backend: str | None) -> None:
    call = (logits, k, temperature)
    OP.pick(backend, call[0].device, call)(*call, log_probs, token_ids)


torch.library.custom_op("specvlm::draft_topk", _run, mutates_args=("log_probs", "token_ids")).register_fake(
    lambda *_: None
)


def _torch(logits: Tensor, k: int, temperature: float, log_probs: Tensor, token_ids: Tensor) -> None:
    top_log_probs, top_ids = reference(logits, k, temperature=temperature)
    log_probs.view_as(top_log_probs).copy_(top_log_probs)
    token_ids.view_as(top_ids).copy_(top_ids)


MOST_CUDA_TOKENS = 64  # csrc/include/specvlm/draft_topk.h


def _cuda_missing(logits: Tensor, k: int, *_: object) -> str | None:
    if reason := not_for_cuda_logits(logits, batch=logits.shape[0]):
        return reason
    return None if k <= MOST_CUDA_TOKENS else f"at most {MOST_CUDA_TOKENS} tokens a row, got k={k}"


@functools.cache
def _plan(rows: int, vocab: int, k: int, aligned: bool) -> Any:
    return extension()[0].draft_topk_plan(rows, vocab, k, aligned)


def _cuda(logits: Tensor, k: int, temperature: float, log_probs: Tensor, token_ids: Tensor) -> Launch:
    rows, vocab = logits.shape
    plan = _plan(rows, vocab, k, rows_aligned(logits))
    prepared = extension()[0].DraftTopk(
        plan=plan,
        row_stride=logits.stride(0),
        rows=rows,
        vocab=vocab,
        k=k,
        factor=min(math.log2(math.e) / temperature, 1e30),  # float32's range
        dtype=logits_type(logits),
    )
    return launched(prepared.launch, 8 * plan.workspace_entries, logits, log_probs, token_ids)


def _triton(logits: Tensor, k: int, temperature: float, log_probs: Tensor, token_ids: Tensor) -> None:
    from ..triton.draft_topk import draft_topk as kernel

    kernel(logits, k, temperature, log_probs.view(-1, k), token_ids.view(-1, k))


def _triton_missing(logits: Tensor, k: int, *_: object) -> str | None:
    if reason := not_for_triton(logits):
        return reason
    if logits.shape[-1] > 1 << 20:
        return f"at most {1 << 20} tokens in the vocabulary, got {logits.shape[-1]}"
    return None if k <= 64 else f"at most 64 tokens a row, got k={k}"


OP.tiers["cuda"] = Tier(missing=_cuda_missing, run=_cuda)
OP.tiers["triton"] = Tier(missing=_triton_missing, run=_triton)
OP.tiers["torch"] = Tier(missing=lambda *_: None, run=_torch)
