"""verify_greedy: the longest path of the tree that the target's argmax agrees with."""

from __future__ import annotations

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
from ..reference.verify_greedy import Verdict
from ..reference.verify_greedy import verify_greedy as reference

OP = register("verify_greedy")

Call = tuple[Tensor, Tensor, Tensor, Tensor | None]


def verify_greedy(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    *,
    tree_lens: Tensor | None = None,
    backend: str | None = None,
) -> Verdict:
    """Walks from the root to the child whose token is the target's argmax, until there is none.

    Ties of the argmax go to the lower id (NaN lowest), among equal children to the lower node. A node whose parent
    is not a lower node of the tree is never reached.

    Args:
        logits: [B,N,vocab] bf16, fp16 or fp32, the target's at every node.
        tokens: int64 [B,N]; node 0 is the root, the last token already decided.
        parents: int32 [N] or [B,N]; parents[0] = -1, and a parent's index is below its child's.
        tree_lens: int32 [B], nodes per request; None for N.
        backend: None for the best that supports the call, or "cuda", "triton", "torch".

    Returns:
        Verdict(path int32 [B,N]: accepted nodes without the root, then -1; length int32 [B]: how many;
        next_token int64 [B]: the argmax at the last accepted node).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or range.
        BackendUnavailableError: the named backend cannot run this call.

    Reference: specvlm_kernels.reference.verify_greedy. Source: SpecVLM, section 3.3 (verification).
    """
    seen = (logits, tokens, parents, tree_lens), (backend,), ()
    if outputs := OP.again(seen):
        return Verdict(*outputs)
    call = prepare(logits, tokens, parents, tree_lens=tree_lens)
    verdict = empty_verdict(tokens)
    if tokens.shape[0]:
        OP.run(call, verdict, backend, seen)
    return verdict


def prepare(logits: Tensor, tokens: Tensor, parents: Tensor, *, tree_lens: Tensor | None = None) -> Call:
    """The checked inputs as the tiers take them: parents with their batch dim."""
    parents = check_tree(logits, tokens, parents)
    if tree_lens is not None:
        check.tensor("tree_lens", tree_lens, "B", check.INT32, {"B": tokens.shape[0]}, logits.device)
        check.device_values("tree_lens", tree_lens, 1, tokens.shape[1])
    return logits, tokens, parents, tree_lens


def check_tree(logits: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
    """Checks what both verify ops take; returns parents as [B,N]."""
    sizes: check.Sizes = {}
    check.tensor("logits", logits, "B N vocab", check.FLOATS, sizes)
    check.tensor("tokens", tokens, "B N", check.INT64, sizes, logits.device)
    if sizes["N"] == 0 or sizes["vocab"] == 0:
        raise ValueError(f"logits: expected at least one node and one token, got {list(logits.shape)}")
    if not isinstance(parents, Tensor):
        raise TypeError(f"parents: expected a torch.Tensor, got {type(parents).__name__}")
    dims = "N" if parents.dim() == 1 else "B N"
    check.tensor("parents", parents, dims, check.INT32, sizes, logits.device)
    check.device_values("parents", parents, -1, sizes["N"] - 2)
    return parents.expand(sizes["B"], sizes["N"])


def empty_verdict(tokens: Tensor) -> Verdict:
    b, n = tokens.shape
    return Verdict(
        path=torch.empty(b, n, dtype=torch.int32, device=tokens.device),
        length=torch.empty(b, dtype=torch.int32, device=tokens.device),
        next_token=torch.empty(b, dtype=torch.int64, device=tokens.device),
    )


def _run(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    tree_lens: Tensor | None,
    path: Tensor,
    length: Tensor,
    next_token: Tensor,
    backend: str | None,
) -> None:
    call = (logits, tokens, parents, tree_lens)
    OP.pick(backend, call[0].device, call)(*call, path, length, next_token)


torch.library.custom_op("specvlm::verify_greedy", _run, mutates_args=("path", "length", "next_token")).register_fake(
    lambda *_: None
)


def _torch(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    tree_lens: Tensor | None,
    path: Tensor,
    length: Tensor,
    next_token: Tensor,
) -> None:
    verdict = reference(logits, tokens, parents, tree_lens=tree_lens)
    for given, computed in zip((path, length, next_token), verdict):
        given.copy_(computed)


MOST_CUDA_NODES = 4096  # csrc/include/specvlm/verify_greedy.h


def _cuda_missing(logits: Tensor, *_: object) -> str | None:
    if reason := not_for_cuda_logits(logits, batch=logits.shape[0]):
        return reason
    n = logits.shape[1]
    return None if n <= MOST_CUDA_NODES else f"at most {MOST_CUDA_NODES} nodes, got {n}"


def _cuda(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    tree_lens: Tensor | None,
    path: Tensor,
    length: Tensor,
    next_token: Tensor,
) -> Launch:
    module, _ = extension()
    b, n, vocab = logits.shape
    aligned = rows_aligned(logits)
    prepared = module.VerifyGreedy(
        batch_stride=logits.stride(0),
        node_stride=logits.stride(1),
        tokens_stride=tokens.stride(0),
        parents_stride=parents.stride(0),
        path_stride=path.stride(0),
        batch=b,
        nodes=n,
        vocab=vocab,
        dtype=logits_type(logits),
        aligned=aligned,
    )
    workspace = 8 * module.verify_greedy_workspace(b, n, vocab, aligned)
    tensors = (logits, tokens, parents, tree_lens, path, length, next_token)
    return launched(prepared.launch, workspace, *tensors)


def _triton(*call: Any) -> None:
    from ..triton.verify_greedy import verify_greedy as kernel

    kernel(*call)


def _triton_missing(logits: Tensor, tokens: Tensor, *_: object) -> str | None:
    if reason := not_for_triton(logits):
        return reason
    n = tokens.shape[1]
    return None if n <= 4096 else f"at most 4096 nodes, got {n}"


OP.tiers["cuda"] = Tier(missing=_cuda_missing, run=_cuda)
OP.tiers["triton"] = Tier(missing=_triton_missing, run=_triton)
OP.tiers["torch"] = Tier(missing=lambda *_: None, run=_torch)
