"""expand_tree: which nodes a draft reads next, and the best of all that it proposed, as a tree to verify."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..backend import Tier, extension, register
from ..launches import Launch, launched
from ..reference.expand_tree import Expansion
from ..reference.expand_tree import expand_tree as reference

OP = register("expand_tree")

Call = tuple[Tensor, Tensor, Tensor, int | None]


def expand_tree(
    log_probs: Tensor,
    token_ids: Tensor,
    root: Tensor,
    nodes: int | None = None,
    *,
    out: Expansion | None = None,
    backend: str | None = None,
) -> Expansion:
    """Keeps the likeliest of a draft's candidates: the nodes to read next, or, with `nodes`, the tree to verify.

    The draft reads the root, and after it k nodes of every level, in the order of their rows: row 0 is the root, and
    rows 1+(d-1)k .. dk are the k best candidates of depth d. Row r proposes k candidates, its children; they are
    numbered r*k + rank. A candidate's score is the sum of the log-probabilities on the way to it, added from the root
    down in float32; a log-probability above 0 counts as 0, NaN as -inf. Better is: the higher score, then the lower
    number. So a parent is always better than its children, and whatever is kept hangs together.

    Nothing but log_probs decides which candidate a row is. Calls for more and more rows of one buffer therefore agree,
    and no index is taken from the device.

    Args:
        log_probs: float32 [B,R,k], from draft_topk, k 1 or more; R = 1 + (levels-1)*k rows.
        token_ids: int64 [B,R,k], from draft_topk.
        root: int64 [B], the last token already decided.
        nodes: None for all R rows and the k best candidates of the deepest level, which are to be read next (R+k
            nodes); or N, 1 to 1+R*k, for the root and the N-1 best of all candidates.
        out: an Expansion of contiguous tensors to write to, mutated; None for new ones.
        backend: None for the best that supports the call, or "cuda", "triton", "torch".

    Returns:
        Expansion, the nodes by depth, then the better first (with nodes=None, node i is row i):
        tokens int64 [B,N]; tokens[:,0] is the root's.
        parents int32 [B,N]; parents[:,0] = -1, and a parent's index is below its child's.
        depths int32 [B,N], from 0 at the root.
        mask int64 [B,N,ceil(N/64)], the node itself and its ancestors, as tree_attention takes it.
        rows int32 [B,N]: the row that a node is, whose keys and values the draft has; -1 if it was not read.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride, device or range.
        BackendUnavailableError: the named backend cannot run this call.

    Reference: specvlm_kernels.reference.expand_tree. Source: EAGLE-2 (arXiv 2406.16858), section 4 (expansion and
    reranking).
    """
    given = out if isinstance(out, tuple) else ()
    seen = (log_probs, token_ids, root), (nodes, out is None, backend), given
    if outputs := OP.again(seen):
        return Expansion(*outputs)
    call = prepare(log_probs, token_ids, root, nodes)
    tree = empty_expansion(log_probs, nodes) if out is None else _check_out(out, log_probs, nodes)
    if log_probs.shape[0]:
        OP.run(call, tree, backend, seen)
    return tree


def prepare(log_probs: Tensor, token_ids: Tensor, root: Tensor, nodes: int | None = None) -> Call:
    """The checked inputs as the tiers take them."""
    sizes: check.Sizes = {}
    check.tensor("log_probs", log_probs, "B R k", (torch.float32,), sizes)
    rows, k = sizes["R"], sizes["k"]
    if k < 1 or rows < 1 or (rows - 1) % k:
        raise ValueError(f"log_probs: expected R = 1 + (levels-1)*k rows and k >= 1, got {list(log_probs.shape)}")
    check.tensor("token_ids", token_ids, "B R k", check.INT64, sizes, log_probs.device)
    check.tensor("root", root, "B", check.INT64, sizes, log_probs.device)
    if nodes is not None:
        check.integer("nodes", nodes, 1, 1 + rows * k)
    return log_probs, token_ids, root, nodes


def _size(log_probs: Tensor, nodes: int | None) -> int:
    return log_probs.shape[1] + log_probs.shape[2] if nodes is None else nodes


def empty_expansion(log_probs: Tensor, nodes: int | None = None) -> Expansion:
    """Room for what a call with these arguments returns."""
    b, n, device = log_probs.shape[0], _size(log_probs, nodes), log_probs.device
    parents, depths, rows = (torch.empty(b, n, dtype=torch.int32, device=device) for _ in range(3))
    return Expansion(
        tokens=torch.empty(b, n, dtype=torch.int64, device=device),
        parents=parents,
        depths=depths,
        mask=torch.empty(b, n, (n + 63) // 64, dtype=torch.int64, device=device),
        rows=rows,
    )


def _check_out(out: Expansion, log_probs: Tensor, nodes: int | None) -> Expansion:
    if not isinstance(out, tuple) or len(out) != len(Expansion._fields):
        raise TypeError(f"out: expected an Expansion, got {type(out).__name__}")
    n = _size(log_probs, nodes)
    sizes = {"B": log_probs.shape[0], "N": n, "W": (n + 63) // 64}
    for name, tensor in zip(Expansion._fields, out):
        dtypes = check.INT64 if name in ("tokens", "mask") else check.INT32
        check.tensor(f"out.{name}", tensor, "B N W" if name == "mask" else "B N", dtypes, sizes, log_probs.device)
        if not tensor.is_contiguous():
            raise ValueError(f"out.{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return Expansion(*out)


def _run(
    log_probs: Tensor,
    token_ids: Tensor,
    root: Tensor,
    nodes: int | None,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    mask: Tensor,
    rows: Tensor,
    backend: str | None,
) -> None:
    call = (log_probs, token_ids, root, nodes)
    OP.pick(backend, call[0].device, call)(*call, tokens, parents, depths, mask, rows)


torch.library.custom_op(
    "specvlm::expand_tree", _run, mutates_args=("tokens", "parents", "depths", "mask", "rows")
).register_fake(lambda *_: None)


def _torch(log_probs: Tensor, token_ids: Tensor, root: Tensor, nodes: int | None, *out: Tensor) -> None:
    reference(log_probs, token_ids, root, nodes, out=Expansion(*out))


MOST_NODES = 512  # csrc/include/specvlm/expand_tree.h
MOST_CANDIDATES = 8192


def _too_large(log_probs: Tensor, _token_ids: Tensor, _root: Tensor, nodes: int | None) -> str | None:
    """What both GPU kernels say: one program holds all candidates of a request."""
    _, rows, k = log_probs.shape
    if max(rows, n := _size(log_probs, nodes)) > MOST_NODES:
        return f"at most {MOST_NODES} rows and nodes, got {rows} rows and {n} nodes"
    return None if rows * k <= MOST_CANDIDATES else f"at most {MOST_CANDIDATES} candidates, got {rows} rows of {k}"


def _cuda(
    log_probs: Tensor,
    token_ids: Tensor,
    root: Tensor,
    nodes: int | None,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    mask: Tensor,
    rows: Tensor,
) -> Launch:
    batch, read, width = log_probs.shape
    prepared = extension()[0].ExpandTree(
        log_probs_stride=log_probs.stride(0),
        log_probs_row=log_probs.stride(1),
        token_ids_stride=token_ids.stride(0),
        token_ids_row=token_ids.stride(1),
        batch=batch,
        rows=read,
        width=width,
        nodes=tokens.shape[1],
        all_rows=nodes is None,
    )
    return launched(prepared.launch, 0, log_probs, token_ids, root, tokens, parents, depths, mask, rows)


def _triton(*call: Any) -> None:
    from ..triton.expand_tree import expand_tree as kernel

    kernel(*call)


OP.tiers["cuda"] = Tier(missing=_too_large, run=_cuda)
OP.tiers["triton"] = Tier(missing=_too_large, run=_triton)
OP.tiers["torch"] = Tier(missing=lambda *_: None, run=_torch)
