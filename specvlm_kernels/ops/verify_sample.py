"""verify_sample: lossless acceptance for sampling, with the coins as an input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..backend import (
    Tier,
    architecture,
    extension,
    logits_type,
    not_for_cuda_logits,
    not_for_triton,
    register,
    rows_aligned,
)
from ..launches import Launch, launched
from ..reference.verify_greedy import Verdict
from ..reference.verify_sample import verify_sample as reference
from .verify_greedy import check_tree, empty_verdict

OP = register("verify_sample")

Call = tuple[Tensor, Tensor, Tensor, Tensor, float, int | None, float | None]


def verify_sample(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    coins: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    draft_log_probs: Tensor | None = None,
    backend: str | None = None,
) -> Verdict:
    """Accepts a path and samples the next token so that all emitted tokens follow the target's distribution.

    At a visited node with target distribution p (after temperature, then top_k, then top_p), its coin picks by
    inverse CDF over [children in node order, everything else]. In a child's interval the child is accepted; in
    the rest the walk stops and next_token comes from p without the children's mass, renormalised, by inverse CDF
    over ascending ids with the last coin; at a node without children from p itself. A child with p = 0 is never
    accepted, also by coin 0; of siblings with equal tokens only the first has mass.

    Args:
        logits: [B,N,vocab] bf16, fp16 or fp32, the target's at every node.
        tokens: int64 [B,N]; node 0 is the root.
        parents: int32 [N] or [B,N]; parents[0] = -1, and a parent's index is below its child's.
        coins: float32 [B,N+1] in [0,1): one per node, the last for next_token.
        temperature: above 0.
        top_k: keep the k highest logits (ties to the lower id); None for all.
        top_p: keep the smallest prefix, by descending logit, whose mass reaches top_p, in (0,1]; None for all.
        draft_log_probs: float32 [B,N], checked and not used: siblings are the draft's top-k, taken without
            chance, so the target's distribution alone decides.
        backend: None for the best that supports the call, or "cuda", "triton", "torch".

    Returns:
        Verdict(path int32 [B,N]: accepted nodes without the root, then -1; length int32 [B]; next_token int64 [B]).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or range.
        BackendUnavailableError: the named backend cannot run this call.

    Reference: specvlm_kernels.reference.verify_sample. Source: Leviathan et al. 2023 (speculative sampling) for
    a draft without chance; SpecInfer, section 4.3, for the tree.
    """
    seen = None
    if draft_log_probs is None:  # no kernel takes them, so they have to be checked every time
        seen = (logits, tokens, parents, coins), (temperature, top_k, top_p, backend), ()
        if outputs := OP.again(seen):
            return Verdict(*outputs)
    call = prepare(
        logits,
        tokens,
        parents,
        coins,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        draft_log_probs=draft_log_probs,
    )
    verdict = empty_verdict(tokens)
    if tokens.shape[0]:
        OP.run(call, verdict, backend, seen)
    return verdict


def prepare(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    coins: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    draft_log_probs: Tensor | None = None,
) -> Call:
    """The checked inputs as the tiers take them: parents with their batch dim."""
    parents = check_tree(logits, tokens, parents)
    b, n, vocab = logits.shape
    sizes = {"B": b, "N": n, "N+1": n + 1}
    check.tensor("coins", coins, "B N+1", (torch.float32,), sizes, logits.device)
    temperature = check.real("temperature", temperature, 0, low_open=True)
    if top_k is not None:
        top_k = min(check.integer("top_k", top_k, 1), vocab)
    if top_p is not None:
        top_p = check.real("top_p", top_p, 0, 1, low_open=True)
    if draft_log_probs is not None:
        check.tensor("draft_log_probs", draft_log_probs, "B N", (torch.float32,), sizes, logits.device)
    check.device_values("coins", coins, 0, 1)
    return logits, tokens, parents, coins, temperature, top_k, top_p


def _run(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    coins: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    path: Tensor,
    length: Tensor,
    next_token: Tensor,
    backend: str | None,
) -> None:
    call = (logits, tokens, parents, coins, temperature, top_k, top_p)
    OP.pick(backend, call[0].device, call)(*call, path, length, next_token)


torch.library.custom_op("specvlm::verify_sample", _run, mutates_args=("path", "length", "next_token")).register_fake(
    lambda *_: None
)


def _torch(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    coins: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    path: Tensor,
    length: Tensor,
    next_token: Tensor,
) -> None:
    verdict = reference(logits, tokens, parents, coins, temperature=temperature, top_k=top_k, top_p=top_p)
    for given, computed in zip((path, length, next_token), verdict):
        given.copy_(computed)


MOST_CUDA_NODES, MOST_CUDA_ROWS = 768, 1 << 16  # csrc/include/specvlm/verify_sample.h


def _cuda_missing(logits: Tensor, *_: object) -> str | None:
    if reason := not_for_cuda_logits(logits, batch=logits.shape[0]):
        return reason
    b, n, _vocab = logits.shape
    if n > MOST_CUDA_NODES:
        return f"at most {MOST_CUDA_NODES} nodes, got {n}"
    return None if b * n <= MOST_CUDA_ROWS else f"at most {MOST_CUDA_ROWS} nodes of all requests, got {b * n}"


def _cuda(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    coins: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    path: Tensor,
    length: Tensor,
    next_token: Tensor,
) -> Launch:
    module, _ = extension()
    b, n, vocab = logits.shape
    top_k = vocab if top_k is None else top_k
    top_p = 1.0 if top_p is None else top_p
    aligned = rows_aligned(logits)
    prepared = module.VerifySample(
        batch_stride=logits.stride(0),
        node_stride=logits.stride(1),
        tokens_stride=tokens.stride(0),
        parents_stride=parents.stride(0),
        coins_stride=coins.stride(0),
        path_stride=path.stride(0),
        batch=b,
        nodes=n,
        vocab=vocab,
        top_k=top_k,
        top_p=top_p,
        factor=min(max(math.log2(math.e) / temperature, 1e-36), 1e30),  # float32's range
        dtype=logits_type(logits),
        aligned=aligned,
        overlap=architecture(logits.device.index) >= 90,
    )
    workspace = module.verify_sample_workspace(b, n, vocab, aligned, top_k < vocab or top_p < 1)
    tensors = (logits, tokens, parents, coins, path, length, next_token)
    return launched(prepared.launch, workspace, *tensors)


def _triton(*call: Any) -> None:
    from ..triton.verify_sample import verify_sample as kernel

    kernel(*call)


def _triton_missing(logits: Tensor, *_: object) -> str | None:
    if reason := not_for_triton(logits):
        return reason
    vocab = logits.shape[-1]
    return None if vocab <= 1 << 20 else f"at most {1 << 20} tokens in the vocabulary, got {vocab}"


OP.tiers["cuda"] = Tier(missing=_cuda_missing, run=_cuda)
OP.tiers["triton"] = Tier(missing=_triton_missing, run=_triton)
OP.tiers["torch"] = Tier(missing=lambda *_: None, run=_torch)
