"""The shortest correct PyTorch of every op: the specification, the test oracle and the "torch" backend.

Dense and readable, on CPU or GPU, in float64 when the inputs are float64. Importable as
``specvlm_kernels.reference``; imports nothing but torch.
"""

from .compact_kv import compact_kv
from .draft_topk import draft_topk
from .expand_tree import Expansion, expand_tree
from .select_tokens import Selection, select_tokens
from .token_scores import token_scores
from .tree_attention import tree_attention
from .verify_greedy import Verdict, verify_greedy
from .verify_sample import target_distribution, verify_sample

__all__ = [
    "tree_attention",
    "token_scores",
    "select_tokens",
    "draft_topk",
    "expand_tree",
    "verify_greedy",
    "verify_sample",
    "compact_kv",
    "Selection",
    "Expansion",
    "Verdict",
    "target_distribution",
]
