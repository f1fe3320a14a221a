"""GPU kernels and a decoding loop for speculative decoding of video LLMs (SpecVLM).

The ops, in the order of the data path: tree_attention, token_scores, select_tokens, draft_topk, expand_tree,
verify_greedy / verify_sample, compact_kv. Each runs on CUDA, Triton or plain torch; `explain` says which and why.
"""

from . import reference
from .backend import BackendUnavailableError, explain
from .ops.compact_kv import compact_kv
from .ops.draft_topk import draft_topk
from .ops.expand_tree import expand_tree
from .ops.select_tokens import select_tokens
from .ops.token_scores import token_scores
from .ops.tree_attention import tree_attention
from .ops.verify_greedy import verify_greedy
from .ops.verify_sample import verify_sample
from .pruning import Pruning, keep_count
from .reference.expand_tree import Expansion
from .reference.select_tokens import Selection
from .reference.verify_greedy import Verdict
from .tree import SPECVLM_TREE, DynamicTree, TokenTree

__version__ = "0.1.0"

__all__ = [
    "tree_attention",
    "token_scores",
    "select_tokens",
    "keep_count",
    "draft_topk",
    "expand_tree",
    "verify_greedy",
    "verify_sample",
    "compact_kv",
    "Selection",
    "Expansion",
    "Verdict",
    "TokenTree",
    "DynamicTree",
    "SPECVLM_TREE",
    "Pruning",
    "SpeculativeDecoder",
    "Sampling",
    "Generation",
    "explain",
    "BackendUnavailableError",
    "reference",
]


def __getattr__(name: str) -> object:
    if name in (
        "SpeculativeDecoder",
        "Generation",
        "Sampling",
    ):  # the loop is not paid for by who imports the ops
        from . import decoding

        return getattr(decoding, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
