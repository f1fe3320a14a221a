"""The draft's k most likely next tokens with their log-probabilities over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulate_dtype, nan_lowest


def draft_topk(logits: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    x = nan_lowest(logits)
    token_ids = torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]
    scaled = x.to(accumulate_dtype(x)) / temperature
    log_probs = scaled.gather(-1, token_ids) - torch.logsumexp(scaled, -1, keepdim=True)
    return log_probs, token_ids
