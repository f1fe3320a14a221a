"""Benchmarks of every op: `python -m bench [op ...]`. See bench/__main__.py for the options."""

OPS = (
    "tree_attention",
    "token_scores",
    "select_tokens",
    "draft_topk",
    "expand_tree",
    "verify_greedy",
    "verify_sample",
    "compact_kv",
)
"""In the order of the data path; bench/bench_<op>.py lists an op's cases."""
