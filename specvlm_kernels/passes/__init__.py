"""Lean decoding passes over a transformers model's own weights; see `lean.LeanText`."""

from .lean import LeanText
from .ops import PASSES

__all__ = ["PASSES", "LeanText"]
