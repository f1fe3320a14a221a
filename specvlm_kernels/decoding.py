"""The decoding loop: the ops in the order of the data path, over any model that speaks `Model`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _checks as check
from .ops.compact_kv import compact_kv
from .ops.draft_topk import draft_topk
from .ops.verify_greedy import verify_greedy
from .ops.verify_sample import verify_sample
from .pruning import Pruning
from .reference.verify_greedy import Verdict
from .tree import SPECVLM_TREE, TokenTree

PHASES = ("target_prefill", "rating", "select", "draft_prefill", "draft", "verify", "accept", "commit")


@dataclass
class KVCache:
    """A model's keys and values: [L,B,S,Hkv,D] each, and kv_lens int32 [B], how much of it is context."""

    keys: Tensor
    values: Tensor
    kv_lens: Tensor

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


@dataclass
class Prompt:
    """A prompt after the vision tower.

    embeds [1,S,hidden]; positions int64 [axes,1,S] (3 axes for M-RoPE, else 1); visual bool [S];
    next_position: the first generated token's position.
    """

    embeds: Tensor
    positions: Tensor
    visual: Tensor
    next_position: int

    def take(self, index: Tensor) -> Prompt:
        """The prompt with only these tokens, each at its own position."""
        return Prompt(self.embeds[:, index], self.positions[..., index], self.visual[index], self.next_position)


@dataclass
class Rating:
    """Gathers the attention that the text pays to cache positions start .. start+V-1 into scores [1,V]."""

    scores: Tensor
    start: int
    clock: Clock


class Model(Protocol):
    """What the loop needs of a causal language model whose prompt may hold visual tokens."""

    vocab_size: int
    stop_tokens: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where its weights, caches and outputs are."""

    def embed(self, inputs: Mapping[str, Any]) -> Prompt:
        """Runs the vision tower and embeds the prompt."""

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one request."""

    def forward(
        self,
        cache: KVCache,
        tokens: Tensor,
        positions: Tensor,
        *,
        first: int = 0,
        tree_mask: Tensor | None = None,
        fresh: bool = False,
        rating: Rating | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits [1,n,vocab] of n new tokens (int64 [1,n], or embeddings [1,n,hidden]), written to the cache at
        kv_lens+first onwards without advancing kv_lens. They are nodes first .. first+n-1 of a tree of first+n
        nodes with this mask (None: a causal chain). fresh: the cache is empty and the chain starts the prompt.
        rating: also rate the visual tokens. last_only: logits [1,1,vocab] of the last token."""


@dataclass(frozen=True)
class Sampling:
    """Sampling from the target: temperature, then top_k, then top_p; the same seed gives the same tokens."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check.real("temperature", self.temperature, 0, low_open=True)
        if self.top_k is not None:
            check.integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            check.real("top_p", self.top_p, 0, 1, low_open=True)
        check.integer("seed", self.seed, 0)


@dataclass
class Stats:
    """What a generation did. Times are seconds of wall clock, with the device synchronised at each boundary.

    tau: mean draft tokens accepted per round, without the target's own token; tokens_per_round = tau + 1.
    """

    prompt_tokens: int = 0
    visual_tokens: int = 0
    kept_tokens: int = 0
    stage1_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    accepted: int = 0
    target_passes: int = 0
    draft_passes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tau(self) -> float:
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_round(self) -> float:
        return self.tau + 1 if self.rounds else 0.0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        derived = {
            "tau": self.tau,
            "tokens_per_round": self.tokens_per_round,
            "total_seconds": self.total_seconds,
        }
        return asdict(self) | derived


@dataclass
class Generation:
    """tokens (stop token included), text (None without a tokenizer), stats, and what the draft read.

    kept int64 [keep]: prompt indices of the visual tokens the draft read (None without pruning); scores float32
    [V]: the target's attention to the prompt tokens from scores_start on; margins: the target's best logit less
    its second, for every token of generate_autoregressive.
    """

    tokens: list[int]
    text: str | None
    stats: Stats
    kept: Tensor | None = None
    scores: Tensor | None = None
    scores_start: int = 0
    margins: list[float] | None = None


class Clock:
    """Adds up wall time per phase; phases nest, and inner time is not counted twice."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device
        self._running: list[list] = []  # [phase, when it last started to count]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        now = self._now()
        if self._running:
            self._add(self._running[-1], now)
        self._running.append([phase, now])
        try:
            yield
        finally:
            now = self._now()
            self._add(self._running.pop(), now)
            if self._running:
                self._running[-1][1] = now

    def _add(self, entry: list, now: float) -> None:
        self.seconds[entry[0]] = self.seconds.get(entry[0], 0.0) + now - entry[1]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


OnTokens = Callable[[list[int]], None]


class _Output:
    """Tokens so far, cut at the first stop token and at max_new_tokens."""

    def __init__(self, stop: frozenset[int], limit: int, on_tokens: OnTokens | None):
        self.tokens: list[int] = []
        self.done = False
        self._stop, self._limit, self._on_tokens = stop, limit, on_tokens

    def extend(self, tokens: Sequence[int]) -> None:
        fresh = []
        for token in tokens:
            if self.done:
                break
            fresh.append(token)
            self.done = token in self._stop or len(self.tokens) + len(fresh) == self._limit
        self.tokens += fresh
        if fresh and self._on_tokens is not None:
            self._on_tokens(fresh)


@dataclass
class _Side:
    """One model of the pair while it generates: its cache, and how positions follow from cache lengths."""

    model: Model
    cache: KVCache
    offset: int  # position of the next token, less kv_lens


class SpeculativeDecoder:
    """Decodes with a target model by letting a draft propose a tree of tokens that the target checks at once.

    The output is the target's own: token for token in greedy decoding, in distribution with sampling.

    Args:
        target, draft: see `Model`; `from_transformers` wraps transformers' classes.
        tree: the shape of the token tree, by default the paper's 26 nodes.
        pruning: how the draft's visual tokens are chosen, by default the paper's method at 90%.
        sampling: None for greedy.
        positions: "original" leaves kept tokens at their own positions in the draft; "compact" renumbers the
            draft's prompt from 0, as the published code does.
        tokenizer: turns tokens into text; optional.
        max_cache_tokens: refuse requests that need more cache than this; None for no limit.
    """

    def __init__(
        self,
        target: Model,
        draft: Model,
        *,
        tree: TokenTree = SPECVLM_TREE,
        pruning: Pruning | None = None,
        sampling: Sampling | None = None,
        positions: str = "original",
        tokenizer: Any = None,
        max_cache_tokens: int | None = None,
    ):
        for name, value, kind in (
            ("tree", tree, TokenTree),
            ("pruning", pruning, Pruning),
            ("sampling", sampling, Sampling),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
        if positions not in ("original", "compact"):
            raise ValueError(f'positions: expected "original" or "compact", got {positions!r}')
        if tree.width > min(target.vocab_size, draft.vocab_size):
            raise ValueError(f"tree: needs {tree.width} candidates per node, more than the vocabulary has")
        if max_cache_tokens is not None:
            check.integer("max_cache_tokens", max_cache_tokens, 1)
        self.target, self.draft, self.tree, self.sampling = target, draft, tree, sampling
        self.pruning = Pruning() if pruning is None else pruning
        self.positions, self.tokenizer, self.max_cache_tokens = positions, tokenizer, max_cache_tokens
        self.shared_vocab = min(target.vocab_size, draft.vocab_size)  # beyond it there is only padding

    @classmethod
    def from_transformers(cls, target: Any, draft: Any, **options: Any) -> SpeculativeDecoder:
        """A decoder over two transformers models; see integrations.transformers.from_transformers."""
        from .integrations.transformers import from_transformers

        return from_transformers(target, draft, **options)

    @torch.inference_mode()
    def generate(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int = 512,
        *,
        stop_tokens: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """Answers one prompt.

        Args:
            inputs: what the model's processor returns, batch 1.
            max_new_tokens: at least 1.
            stop_tokens: end after one of these; None for the target's own.
            on_tokens: called with each round's new tokens.

        Raises:
            TypeError, ValueError: bad arguments, or a request larger than max_cache_tokens.
        """
        out, target, prompt, clock, coins = self._start(inputs, max_new_tokens, stop_tokens, on_tokens)
        stats, tree, device = Stats(prompt_tokens=prompt.embeds.shape[1]), self.tree, prompt.embeds.device
        root, scores = self._prefill_target(target, prompt, clock, coins, rate=self.pruning.needs_scores)
        draft, kept = self._prefill_draft(inputs, prompt, scores, max_new_tokens, clock, stats)
        out.extend([root])

        mask, parents, sources = tree.mask_words(device), tree.parents_tensor(device), tree.level_sources(device)
        depths = torch.tensor([tree.depths], device=device)
        pending: list[int] = []  # accepted tokens that the draft has not read
        while not out.done:
            with clock("draft"):
                tokens = self._propose(draft, [*pending, root], mask, sources, stats)
            with clock("verify"):
                positions = target.cache.kv_lens[:, None] + target.offset + depths
                logits = target.model.forward(target.cache, tokens, positions, tree_mask=mask)
            with clock("accept"):
                verdict = self._verify(logits, tokens, parents, coins)
                accepted = int(verdict.length)
                path = verdict.path[0, :accepted].long()
                new = [*tokens[0, path].tolist(), int(verdict.next_token)]
            with clock("commit"):
                compact_kv(target.cache.keys, target.cache.values, target.cache.kv_lens, verdict.path, verdict.length)
                read = verdict.length.clamp(max=tree.max_depth - 1)  # the draft never reads the deepest level
                compact_kv(draft.cache.keys, draft.cache.values, draft.cache.kv_lens, verdict.path, read)
            pending, root = new[tree.max_depth - 1 : -1], new[-1]
            stats.rounds, stats.accepted = stats.rounds + 1, stats.accepted + accepted
            out.extend(new)

        stats.target_passes = 1 + stats.rounds
        return self._finish(out, stats, clock, kept, scores, prompt)

    @torch.inference_mode()
    def generate_autoregressive(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int = 512,
        *,
        stop_tokens: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
        with_margins: bool = False,
    ) -> Generation:
        """The honest baseline: the target alone, a token a pass, on the same cache and kernels.

        Args and errors as generate(); with_margins also records the gap between the two best logits.
        """
        out, target, prompt, clock, coins = self._start(inputs, max_new_tokens, stop_tokens, on_tokens)
        stats = Stats(prompt_tokens=prompt.embeds.shape[1], visual_tokens=int(prompt.visual.sum()))
        margins: list[float] | None = [] if with_margins else None
        token, _ = self._prefill_target(target, prompt, clock, coins, rate=False, margins=margins)
        out.extend([token])
        while not out.done:
            with clock("verify"):
                tokens = torch.tensor([[token]], device=prompt.embeds.device)
                positions = target.cache.kv_lens[:, None].long() + target.offset
                logits = target.model.forward(target.cache, tokens, positions)
                target.cache.kv_lens += 1
            with clock("accept"):
                token = self._next_token(logits, coins, margins)
            stats.rounds += 1
            out.extend([token])
        stats.target_passes = 1 + stats.rounds
        generation = self._finish(out, stats, clock, None, None, prompt)
        generation.margins = margins[: len(out.tokens)] if margins is not None else None
        return generation

    def _start(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int,
        stop_tokens: Sequence[int] | None,
        on_tokens: OnTokens | None,
    ) -> tuple[_Output, _Side, Prompt, Clock, Callable[[int], Tensor]]:
        check.integer("max_new_tokens", max_new_tokens, 1)
        stop = self.target.stop_tokens if stop_tokens is None else stop_tokens
        out = _Output(frozenset(int(token) for token in stop), max_new_tokens, on_tokens)
        device = self.target.device
        clock = Clock(device)
        with clock("target_prefill"):
            prompt = self.target.embed(inputs)
            length = prompt.embeds.shape[1]
            # every accepted token and one last tree
            capacity = self._capacity("target", length, max_new_tokens)
            side = _Side(self.target, self.target.new_cache(capacity), prompt.next_position - length)
        generator = torch.Generator(device).manual_seed(self.sampling.seed if self.sampling else 0)

        def coins(n: int) -> Tensor:
            return torch.rand(1, n, generator=generator, device=device)

        return out, side, prompt, clock, coins

    def _capacity(self, name: str, length: int, max_new_tokens: int) -> int:
        need = length + max_new_tokens + self.tree.num_nodes
        if self.max_cache_tokens is not None and need > self.max_cache_tokens:
            raise ValueError(
                f"the {name}'s cache is too small: {length} prompt tokens, {max_new_tokens} new tokens and a tree of "
                f"{self.tree.num_nodes} need {need} cache tokens, and max_cache_tokens is {self.max_cache_tokens}"
            )
        return need

    def _prefill_target(
        self,
        target: _Side,
        prompt: Prompt,
        clock: Clock,
        coins: Callable[[int], Tensor],
        *,
        rate: bool,
        margins: list[float] | None = None,
    ) -> tuple[int, Tensor | None]:
        """Reads the prompt in two stages, up to the last visual token and the text after it, so that only the
        text's attention is rated; returns the first new token and the scores [1,V] of the visual span."""
        start, split = visual_span(prompt)
        length = prompt.embeds.shape[1]
        scores = rating = None
        with clock("target_prefill"):
            if split:
                self._read(target, prompt, slice(0, split), fresh=True)
            if rate and split:
                scores = torch.zeros(1, split - start, device=prompt.embeds.device)
                rating = Rating(scores, start, clock)
            logits = self._read(target, prompt, slice(split, length), fresh=not split, rating=rating)
        with clock("accept"):
            return self._next_token(logits, coins, margins), scores

    def _prefill_draft(
        self,
        inputs: Mapping[str, Any],
        target_prompt: Prompt,
        scores: Tensor | None,
        max_new_tokens: int,
        clock: Clock,
        stats: Stats,
    ) -> tuple[_Side, Tensor | None]:
        """Prunes the visual tokens and reads the rest with the draft; returns the kept prompt indices too."""
        kept = None
        with clock("select"):
            start, split = visual_span(target_prompt)
            candidates = target_prompt.visual[None, start:split]
            stats.visual_tokens = stats.kept_tokens = int(candidates.sum())
            if self.pruning.method != "none" and stats.visual_tokens:
                stats.kept_tokens = self.pruning.keep(stats.visual_tokens)
                blank = torch.zeros(candidates.shape, device=candidates.device)
                rated = blank if scores is None else scores
                selection = self.pruning.select(rated, candidates, stats.kept_tokens)
                stats.stage1_tokens = int(selection.num_attention) if self.pruning.needs_scores else 0
                kept = selection.indices[0] + start
        with clock("draft_prefill"):
            prompt = self.draft.embed(inputs)
            if not torch.equal(prompt.visual.to(target_prompt.visual.device), target_prompt.visual):
                raise ValueError("draft: its visual tokens are not where the target's are; use models of one family")
            if kept is not None:
                read = ~prompt.visual
                read[kept.to(read.device)] = True
                prompt = prompt.take(read.nonzero()[:, 0])
            length = prompt.embeds.shape[1]
            offset = prompt.next_position - length
            if self.positions == "compact":
                prompt.positions = torch.arange(length, device=prompt.embeds.device).expand_as(prompt.positions)
                offset = 0
            cache = self.draft.new_cache(self._capacity("draft", length, max_new_tokens))
            draft = _Side(self.draft, cache, offset)
            self._read(draft, prompt, slice(0, length), fresh=True)
        return draft, kept

    @staticmethod
    def _read(side: _Side, prompt: Prompt, part: slice, *, fresh: bool, rating: Rating | None = None) -> Tensor:
        embeds, positions = prompt.embeds[:, part], prompt.positions[..., part]
        logits = side.model.forward(side.cache, embeds, positions, fresh=fresh, rating=rating, last_only=True)
        side.cache.kv_lens += embeds.shape[1]
        return logits

    def _propose(
        self,
        draft: _Side,
        chain: list[int],
        mask: Tensor,
        sources: list[tuple[Tensor, Tensor]],
        stats: Stats,
    ) -> Tensor:
        """The tree's tokens int64 [1,N]: the draft reads what it missed and the root, then level after level."""
        tree, cache = self.tree, draft.cache
        device = cache.kv_lens.device
        tokens = torch.empty(1, tree.num_nodes, dtype=torch.int64, device=device)
        tokens[0, 0] = chain[-1]
        first = cache.kv_lens[:, None].long() + draft.offset  # position of the first token of the chain
        ahead = torch.arange(len(chain), device=device)
        # a token past the draft's vocabulary is read as another one: only acceptance can suffer
        new = torch.tensor([chain], device=device).clamp(max=draft.model.vocab_size - 1)
        logits = draft.model.forward(cache, new, first + ahead, last_only=True)
        cache.kv_lens += len(chain) - 1
        stats.draft_passes += tree.max_depth
        for level, nodes in enumerate(tree.levels[1:], 1):
            _, candidates = draft_topk(logits[..., : self.shared_vocab], tree.width)
            rows, ranks = sources[level - 1]
            tokens[0, nodes.start : nodes.stop] = candidates[0, rows, ranks]
            if level < tree.max_depth:
                new = tokens[:, nodes.start : nodes.stop]
                positions = (first + len(chain) - 1 + level).expand_as(new)
                words = mask[: nodes.stop, : (nodes.stop + 63) // 64]
                logits = draft.model.forward(cache, new, positions, first=nodes.start, tree_mask=words)
        return tokens

    def _verify(self, logits: Tensor, tokens: Tensor, parents: Tensor, coins: Callable[[int], Tensor]) -> Verdict:
        if self.sampling is None:
            return verify_greedy(logits, tokens, parents)
        s = self.sampling
        return verify_sample(
            logits,
            tokens,
            parents,
            coins(tokens.shape[1] + 1),
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
        )

    def _next_token(self, logits: Tensor, coins: Callable[[int], Tensor], margins: list[float] | None) -> int:
        """One token from logits [1,1,vocab]: a tree of the root alone."""
        root = torch.zeros(1, 1, dtype=torch.int64, device=logits.device)
        parents = torch.full((1,), -1, dtype=torch.int32, device=logits.device)
        if margins is not None:
            best = logits[0, -1].float().topk(2).values
            margins.append(float(best[0] - best[1]))
        return int(self._verify(logits[:, -1:], root, parents, coins).next_token)

    def _finish(
        self,
        out: _Output,
        stats: Stats,
        clock: Clock,
        kept: Tensor | None,
        scores: Tensor | None,
        prompt: Prompt,
    ) -> Generation:
        stats.new_tokens = len(out.tokens)
        stats.seconds = {phase: clock.seconds.get(phase, 0.0) for phase in PHASES}
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(out.tokens, skip_special_tokens=True)
        return Generation(
            tokens=out.tokens,
            text=text,
            stats=stats,
            kept=kept,
            scores=None if scores is None else scores[0],
            scores_start=visual_span(prompt)[0],
        )


def visual_span(prompt: Prompt) -> tuple[int, int]:
    """First visual token and one past the last, or (0, 0) in a prompt of text."""
    where = prompt.visual.nonzero()
    if not len(where):
        return 0, 0
    start, stop = int(where[0]), int(where[-1]) + 1
    if stop == prompt.embeds.shape[1]:
        raise ValueError("inputs: expected text after the last visual token; its attention rates the video")
    return start, stop
