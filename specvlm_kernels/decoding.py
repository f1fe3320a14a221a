"""The decoding loop: the ops in the order of the data path, over any model that speaks `Model`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from . import graphs as _graphs
from .drafting import Drafter, make_drafter
from .graphs import Program
from .model import KVCache, Model, Prompt, Rating
from .ops.compact_kv import compact_kv
from .ops.verify_greedy import verify_greedy
from .ops.verify_sample import verify_sample
from .pruning import Pruning
from .reference.verify_greedy import Verdict
from .stats import PHASES, Clock, Generation, Stats
from .tree import SPECVLM_TREE, DynamicTree, TokenTree
from .workspace import Side, Workspaces

__all__ = ["PHASES", "Generation", "KVCache", "Model", "Prompt", "Rating", "Sampling", "SpeculativeDecoder", "Stats"]


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


OnTokens = Callable[[list[int]], None]
Accept = Callable[[Tensor, Tensor, Tensor, Tensor], Verdict]  # logits, tokens, parents, coins


class _Output:
    """Tokens so far, cut at the first stop token and at max_new_tokens."""

    def __init__(self, stop: frozenset[int], limit: int, on_tokens: OnTokens | None):
        self.tokens: list[int] = []
        self.done = False
        self._stop, self._limit, self._on_tokens = stop, limit, on_tokens
        self._told = 0

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self.done:
                break
            self.tokens.append(token)
            self.done = token in self._stop or len(self.tokens) == self._limit

    def tell(self) -> None:
        """Calls on_tokens with what is new."""
        new, self._told = self.tokens[self._told :], len(self.tokens)
        if new and self._on_tokens is not None:
            self._on_tokens(new)


@dataclass
class _Request:
    """What one call of generate holds from its start to its end."""

    out: _Output
    prompt: Prompt
    stats: Stats
    clock: Clock
    generator: torch.Generator  # of the coins for sampling

    def toss(self, coins: Tensor) -> None:
        coins.uniform_(generator=self.generator)


class Round:
    """One round on static tensors: drafting, verification, acceptance, commit. Nothing here waits for the device.

    result int64 [1+N]: how many drafted tokens were accepted, then these and the target's next token.
    """

    def __init__(self, target: Side, drafter: Drafter, accept: Accept, graphs: bool):
        n, device = drafter.proposal.tokens.shape[1], target.cache.kv_lens.device
        self.target, self.drafter, self._accept = target, drafter, accept
        self.coins = torch.zeros(1, n + 1, device=device)
        self.result = torch.zeros(1 + n, dtype=torch.int64, device=device)
        self._nodes = torch.arange(n, device=device)
        self._logits: Tensor
        self._verdict: Verdict
        levels = [("draft", level) for level in drafter.levels()]
        self.steps = [*levels, ("verify", self.verify), ("accept", self.accept), ("commit", self.commit)]
        self.state = [target.cache.kv_lens, *drafter.state]
        self.program = Program(self.steps, self.state, self.result, graphs=graphs)

    def verify(self) -> None:
        target, tree = self.target, self.drafter.proposal
        positions = target.next_position + tree.depths
        self._logits = target.model.forward(target.cache, tree.tokens, positions, tree_mask=tree.mask)

    def accept(self) -> None:
        tree = self.drafter.proposal
        self._verdict = path, length, next_token = self._accept(self._logits, tree.tokens, tree.parents, self.coins)
        accepted = tree.tokens.gather(1, path.long().clamp(min=0))
        self.result[:1] = length
        self.result[1:] = torch.where(self._nodes < length, accepted[0], next_token)

    def commit(self) -> None:
        cache, verdict = self.target.cache, self._verdict
        compact_kv(cache.keys, cache.values, cache.kv_lens, verdict.path, verdict.length)
        self.drafter.commit(verdict)


class PlainStep:
    """One token of the target alone, on static tensors.

    result float64 [2]: the token, and the gap between its logit and the second best if wanted (else 0).
    """

    def __init__(self, target: Side, accept: Accept, with_margins: bool, graphs: bool):
        device = target.cache.kv_lens.device
        self.target, self._accept, self._with_margins = target, accept, with_margins
        self.coins = torch.zeros(1, 2, device=device)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.result = torch.zeros(2, dtype=torch.float64, device=device)
        self._parents = torch.full((1,), -1, dtype=torch.int32, device=device)
        self._logits: Tensor
        steps = [("verify", self.verify), ("accept", self.accept)]
        self.program = Program(steps, [target.cache.kv_lens, self.token], self.result, graphs=graphs)

    def verify(self) -> None:
        cache = self.target.cache
        self._logits = self.target.model.forward(cache, self.token, self.target.next_position)
        cache.kv_lens += 1

    def accept(self) -> None:
        verdict = self._accept(self._logits, self.token, self._parents, self.coins)
        self.token.copy_(verdict.next_token[:, None])
        self.result[0] = verdict.next_token[0]
        if self._with_margins:
            self.result[1] = _margin(self._logits)


class SpeculativeDecoder:
    """Decodes with a target model by letting a draft propose a tree of tokens that the target checks at once.

    The output is the target's own: token for token in greedy decoding, in distribution with sampling. Caches and
    recorded graphs are kept for the next request of about the same size; `release` frees them.

    Args:
        target, draft: see `Model`; `from_transformers` wraps transformers' classes.
        tree: the shape of the token tree, by default the paper's 26 nodes; or a DynamicTree, which the draft shapes
            in every round.
        pruning: how the draft's visual tokens are chosen, by default the paper's method at 90%; may be set anew
            between requests.
        sampling: None for greedy.
        positions: "original" leaves kept tokens at their own positions in the draft; "compact" renumbers the
            draft's prompt from 0, as the published code does.
        tokenizer: turns tokens into text; optional.
        max_cache_tokens: refuse requests that need more cache than this; None for no limit.
        graphs: replay rounds as CUDA graphs; None: where that is possible.
    """

    def __init__(
        self,
        target: Model,
        draft: Model,
        *,
        tree: TokenTree | DynamicTree = SPECVLM_TREE,
        pruning: Pruning | None = None,
        sampling: Sampling | None = None,
        positions: str = "original",
        tokenizer: Any = None,
        max_cache_tokens: int | None = None,
        graphs: bool | None = None,
    ):
        for name, value, kinds in (
            ("tree", tree, (TokenTree, DynamicTree)),
            ("pruning", pruning, (Pruning, type(None))),
            ("sampling", sampling, (Sampling, type(None))),
        ):
            if not isinstance(value, kinds):
                names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
                raise TypeError(f"{name}: expected a {names}, got {type(value).__name__}")
        if positions not in ("original", "compact"):
            raise ValueError(f'positions: expected "original" or "compact", got {positions!r}')
        if tree.max_depth == 0:
            raise ValueError("tree: expected at least one node below the root")
        if tree.width > min(target.vocab_size, draft.vocab_size):
            raise ValueError(f"tree: needs {tree.width} candidates per node, more than the vocabulary has")
        if max_cache_tokens is not None:
            check.integer("max_cache_tokens", max_cache_tokens, 1)
        if target.device != draft.device:
            raise ValueError(f"draft: expected it on {target.device} as the target is, got {draft.device}")
        self.target, self.draft, self.tree, self.sampling = target, draft, tree, sampling
        self.pruning = Pruning() if pruning is None else pruning
        self.positions, self.tokenizer, self.max_cache_tokens = positions, tokenizer, max_cache_tokens
        self.graphs = _graphs.enabled(graphs, target.device)
        self.shared_vocab = min(target.vocab_size, draft.vocab_size)  # beyond it there is only padding
        self._workspaces = Workspaces()

    @classmethod
    def from_transformers(cls, target: Any, draft: Any, **options: Any) -> SpeculativeDecoder:
        """A decoder over two transformers models; see integrations.transformers.from_transformers."""
        from .integrations.transformers import from_transformers

        return from_transformers(target, draft, **options)

    def release(self) -> None:
        """Frees the caches and graphs kept for the next request."""
        self._workspaces.release()

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
            on_tokens: called with each round's new tokens, while the device is at the next round.

        Raises:
            TypeError, ValueError: bad arguments, or a request larger than max_cache_tokens.
            MemoryError: the request does not fit the device's memory; raised before the language model runs.
        """
        try:
            request = self._start(inputs, max_new_tokens, stop_tokens, on_tokens)
            target, draft = self._reserve(request.prompt, max_new_tokens, speculate=True)
            root, scores = self._prefill_target(target, request, rate=self.pruning.needs_scores)
            kept = self._prefill_draft(draft, inputs, scores, request)
            round = self._round(target, draft)
            round.drafter.start(root)
            for accepted, *tokens in self._run(round, [root], request):
                request.stats.accepted += accepted
                request.out.extend(tokens[: accepted + 1])
        except torch.OutOfMemoryError:
            self.release()
            raise
        request.stats.draft_passes = request.stats.rounds * round.drafter.passes
        return self._finish(request, kept, scores)

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
        """The honest baseline: the target alone, a token a pass, on the same cache, kernels and graphs.

        Args and errors as generate(); with_margins also records the gap between the two best logits.
        """
        margins: list[float] = []
        try:
            request = self._start(inputs, max_new_tokens, stop_tokens, on_tokens)
            request.stats.visual_tokens = int(request.prompt.visual.sum())
            (target,) = self._reserve(request.prompt, max_new_tokens, speculate=False)
            token, _ = self._prefill_target(target, request, rate=False, margins=margins if with_margins else None)
            step = self._plain_step(target, with_margins)
            step.token.fill_(token)
            for following, margin in self._run(step, [token], request):
                margins.append(margin)
                request.out.extend([int(following)])
        except torch.OutOfMemoryError:
            self.release()
            raise
        generation = self._finish(request, None, None)
        generation.margins = margins[: len(generation.tokens)] if with_margins else None
        return generation

    def _run(self, round: Round | PlainStep, first: list[int], request: _Request):
        """Runs rounds until the output is done and yields the result of each, for the caller to extend the output.

        The next round starts as soon as it is known to be wanted, before the callback sees the tokens. It is not
        started blindly ahead of that: one round in vain costs more than the host's part of all the others.
        """
        out, stats, program = request.out, request.stats, round.program
        out.extend(first)
        if not out.done and not program.ready:
            with request.clock("capture"):
                program.prepare()
            stats.graphs_captured = int(self.graphs)
        began, on_device = time.perf_counter(), sum(stats.seconds.values())
        while not out.done:
            if self.sampling is not None:
                request.toss(round.coins)
            program.launch()
            out.tell()
            result = program.wait(stats.seconds)
            stats.rounds += 1
            yield result
        out.tell()
        on_device = sum(stats.seconds.values()) - on_device
        stats.seconds["host"] += max(0.0, time.perf_counter() - began - on_device)

    def _round(self, target: Side, draft: Side) -> Round:
        def build() -> Round:
            drafter = make_drafter(draft, self.tree, self.shared_vocab)
            return Round(target, drafter, self._verify, self.graphs)

        return self._workspaces.program(("round", id(target), id(draft)), build)

    def _plain_step(self, target: Side, with_margins: bool) -> PlainStep:
        def build() -> PlainStep:
            return PlainStep(target, self._verify, with_margins, self.graphs)

        return self._workspaces.program(("plain", id(target), with_margins), build)

    def _start(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int,
        stop_tokens: Sequence[int] | None,
        on_tokens: OnTokens | None,
    ) -> _Request:
        check.integer("max_new_tokens", max_new_tokens, 1)
        stop = self.target.stop_tokens if stop_tokens is None else stop_tokens
        out = _Output(frozenset(int(token) for token in stop), max_new_tokens, on_tokens)
        device, stats = self.target.device, Stats()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        clock = Clock(device, stats.seconds)
        with clock("target_prefill"):
            prompt = self.target.embed(inputs)
        stats.prompt_tokens = prompt.length
        generator = torch.Generator(device).manual_seed(self.sampling.seed if self.sampling else 0)
        return _Request(out, prompt, stats, clock, generator)

    def _reserve(self, prompt: Prompt, max_new_tokens: int, *, speculate: bool) -> list[Side]:
        """The sides of this request, with room for every new token and one last tree."""
        lengths = {"target": prompt.length}
        if speculate:
            visual = int(prompt.visual.sum())
            lengths["draft"] = prompt.length - visual + self.pruning.keep(visual)
        models = {"target": self.target, "draft": self.draft}
        nodes = {"target": self.tree.num_nodes, "draft": self.tree.draft_nodes}
        requests, working = {}, 0
        for name, length in lengths.items():
            need = length + max_new_tokens + max(2, nodes[name])
            if self.max_cache_tokens is not None and need > self.max_cache_tokens:
                raise ValueError(
                    f"the {name}'s cache is too small: {length} prompt tokens, {max_new_tokens} new tokens and a tree "
                    f"of {nodes[name]} need {need} cache tokens, and max_cache_tokens is "
                    f"{self.max_cache_tokens}"
                )
            requests[name] = models[name], need
            working = max(working, models[name].prefill_bytes(length))
        return list(self._workspaces.reserve(requests, working).values())

    def _prefill_target(
        self, target: Side, request: _Request, *, rate: bool, margins: list[float] | None = None
    ) -> tuple[int, Tensor | None]:
        """Reads the prompt in two stages, up to the last visual token and the text after it, so that only the
        text's attention is rated; returns the first new token and the scores [1,V] of the visual span."""
        prompt = request.prompt
        start, split = visual_span(prompt)
        target.begin(prompt.next_position - prompt.length)
        scores = rating = None
        with request.clock("target_prefill"):
            if split:
                self._read(target, prompt, slice(0, split), fresh=True)
            if rate and split:
                scores = torch.zeros(1, split - start, device=prompt.embeds.device)
                rating = Rating(scores, start, request.clock)
            logits = self._read(target, prompt, slice(split, prompt.length), fresh=not split, rating=rating)
        with request.clock("accept"):
            root = torch.zeros(1, 1, dtype=torch.int64, device=logits.device)
            parents = torch.full((1,), -1, dtype=torch.int32, device=logits.device)
            coins = torch.zeros(1, 2, device=logits.device)
            request.toss(coins)
            if margins is not None:
                margins.append(float(_margin(logits)))
            return int(self._verify(logits, root, parents, coins).next_token), scores

    def _prefill_draft(
        self, draft: Side, inputs: Mapping[str, Any], scores: Tensor | None, request: _Request
    ) -> Tensor | None:
        """Prunes the visual tokens and reads the rest with the draft; returns the kept prompt indices."""
        target_prompt, stats, kept = request.prompt, request.stats, None
        with request.clock("select"):
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
        with request.clock("draft_prefill"):
            prompt = self.draft.embed(inputs)
            if not torch.equal(prompt.visual, target_prompt.visual):
                raise ValueError("draft: its visual tokens are not where the target's are; use models of one family")
            if kept is not None:
                read = ~prompt.visual
                read[kept] = True
                prompt = prompt.take(read.nonzero()[:, 0])
            offset = prompt.next_position - prompt.length
            if self.positions == "compact":
                prompt.positions = torch.arange(prompt.length, device=prompt.embeds.device).expand_as(prompt.positions)
                offset = 0
            draft.begin(offset)
            self._read(draft, prompt, slice(0, prompt.length), fresh=True)
        return kept

    @staticmethod
    def _read(side: Side, prompt: Prompt, part: slice, *, fresh: bool, rating: Rating | None = None) -> Tensor:
        """Reads a part of the prompt; logits [1,1,vocab] of its last token."""
        embeds, positions = prompt.embeds[:, part], prompt.positions[..., part]
        last = torch.tensor([embeds.shape[1] - 1], device=embeds.device)
        logits = side.model.forward(side.cache, embeds, positions, fresh=fresh, rating=rating, rows=last)
        side.cache.kv_lens += embeds.shape[1]
        return logits

    def _verify(self, logits: Tensor, tokens: Tensor, parents: Tensor, coins: Tensor) -> Verdict:
        if self.sampling is None:
            return verify_greedy(logits, tokens, parents)
        s = self.sampling
        return verify_sample(logits, tokens, parents, coins, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)

    def _finish(self, request: _Request, kept: Tensor | None, scores: Tensor | None) -> Generation:
        stats, tokens = request.stats, request.out.tokens
        stats.new_tokens, stats.target_passes = len(tokens), 1 + stats.rounds
        device = self.target.device
        stats.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Generation(
            tokens=tokens,
            text=text,
            stats=stats,
            kept=kept,
            scores=None if scores is None else scores[0],
            scores_start=visual_span(request.prompt)[0],
        )


def _margin(logits: Tensor) -> Tensor:
    """The best logit less the second of the last row."""
    best = logits[0, -1].float().topk(2).values
    return best[0] - best[1]


def visual_span(prompt: Prompt) -> tuple[int, int]:
    """First visual token and one past the last, or (0, 0) in a prompt of text."""
    where = prompt.visual.nonzero()
    if not len(where):
        return 0, 0
    start, stop = int(where[0]), int(where[-1]) + 1
    if stop == prompt.length:
        raise ValueError("inputs: expected text after the last visual token; its attention rates the video")
    return start, stop
