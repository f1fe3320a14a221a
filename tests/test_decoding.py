"""The loop on real transformers classes with random weights: lossless against transformers' own generate."""

import functools
import operator

import pytest
import torch
from models import VIDEO, VOCAB, greedy, llava, llava_inputs, qwen, qwen_inputs
from scipy.stats import chisquare

import specvlm_kernels as sk
from specvlm_kernels.decoding import Sampling

FAMILIES = {"qwen": (qwen, qwen_inputs), "llava": (llava, llava_inputs)}
GROUPS = [(4, 4), (4, 2), (7, 1)]  # heads, KV heads: GQA groups of 1, 2 and 7


def decoder(target, draft, **options):
    return sk.SpeculativeDecoder.from_transformers(target, draft, **options)


@pytest.mark.parametrize("heads,kv_heads", GROUPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family, heads, kv_heads):
    make, make_inputs = FAMILIES[family]
    for seed in range(3):
        target, draft = make(seed, heads, kv_heads), make(seed + 50, 2, 1, layers=1)
        inputs = make_inputs(seed)
        want = greedy(target, inputs, 30)
        both = decoder(target, draft)
        assert both.generate_autoregressive(inputs, 30).tokens == want
        assert both.generate(inputs, 30).tokens == want
        assert greedy(target, inputs, 30) == want  # the model is the user's and left as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_draft_is_always_accepted(family):
    make, make_inputs = FAMILIES[family]
    target, inputs = make(1), make_inputs(1)
    generation = decoder(target, target, pruning=sk.Pruning("none")).generate(inputs, 31)
    assert generation.tokens == greedy(target, inputs, 31)
    assert generation.stats.tau == 5 and generation.stats.rounds == 5 and generation.stats.target_passes == 6


@pytest.mark.parametrize("tree", [sk.TokenTree.chain(1), sk.TokenTree.chain(4), sk.SPECVLM_TREE,
                                  sk.TokenTree.from_paths([(i,) for i in range(80)] + [(0, 0), (0, 0, 0)])],
                         ids=["chain1", "chain4", "paper", "wide"])  # fmt: skip
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_trees_and_half_right_drafts(tree, noise):
    """A draft that is the target with some noise gets all kinds of paths accepted, catch-up included."""
    target, draft, inputs = qwen(2), qwen(2), qwen_inputs(2)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    generation = decoder(target, draft, tree=tree, pruning=sk.Pruning("none")).generate(inputs, 60)
    assert generation.tokens == greedy(target, inputs, 60)
    if noise == 0:
        assert generation.stats.tau == tree.max_depth


def test_the_drafts_cache_equals_a_fresh_one():
    """After rounds with full acceptance the draft sees exactly its prompt and the tokens so far."""
    model, inputs = qwen(3), qwen_inputs(3)
    pair = decoder(model, model, tree=sk.TokenTree.chain(3), pruning=sk.Pruning("none"))
    generation = pair.generate(inputs, 42)
    assert generation.stats.tau == 3  # one stale or shifted entry and the draft would disagree


DYNAMIC = [(1, 1, 2), (1, 4, 3), (5, 1, 6), (5, 1, 3), (3, 4, 10), (5, 10, 26), (5, 10, 60), (4, 3, 31)]
DYNAMIC += [(2, 40, 70), (6, 8, 9)]  # depth, width, nodes


@pytest.mark.parametrize("tree", DYNAMIC, ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_dynamic_trees_and_half_right_drafts(tree, noise):
    """The output is the target's, and the draft's cache is what a fresh pass over prompt and answer gives: accepted
    rows were moved from where they were read, and what was not read was read next."""
    target, draft, inputs = qwen(2), qwen(2), qwen_inputs(2)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    tree = sk.DynamicTree(*tree)
    if tree.nodes < tree.draft_nodes:  # a draft so sure of itself that few nodes make a deep tree
        draft.lm_head.weight = torch.nn.Parameter(6 * draft.lm_head.weight)
    pair = decoder(target, draft, tree=tree, pruning=sk.Pruning("none"))
    generation = pair.generate(inputs, 60)
    assert generation.tokens == greedy(target, inputs, 60)
    stats = generation.stats
    assert stats.draft_passes == tree.depth * stats.rounds and stats.tau > 0
    if noise == 0 and 1 in (tree.width, tree.depth):  # else the greedy path may not be among the likeliest
        assert stats.tau == min(tree.depth, tree.nodes - 1)

    side = next(side for (name, _), side in pair._workspaces._sides.items() if name == "draft")
    model, used = pair.draft, int(side.cache.kv_lens)
    with torch.no_grad():
        prompt, fresh = model.embed(inputs), model.new_cache(side.cache.capacity)
        model.forward(fresh, prompt.embeds, prompt.positions, fresh=True)
        fresh.kv_lens += prompt.length
        answer = torch.tensor([generation.tokens])
        model.forward(fresh, answer, prompt.next_position + torch.arange(answer.shape[1])[None])
    common = min(used, prompt.length + answer.shape[1])
    assert common >= prompt.length + answer.shape[1] - tree.depth - 2
    for got, want in ((side.cache.keys, fresh.keys), (side.cache.values, fresh.values)):
        assert torch.allclose(got[:, :, :common], want[:, :, :common], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_trees_with_pruning_and_another_vocabulary(family):
    make, make_inputs = FAMILIES[family]
    target, inputs = make(4), make_inputs(4)
    for draft in (make(54, 2, 1, layers=1), make(4, vocab=VOCAB - 5), make(4, vocab=VOCAB + 24)):
        generation = decoder(target, draft, tree=sk.DynamicTree(4, 6, 30)).generate(inputs, 30)
        assert generation.tokens == greedy(target, inputs, 30)


@pytest.mark.parametrize("method", ["specvlm", "uniform", "random", "none"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_pruning_never_changes_the_output(method, ratio, positions):
    target, draft, inputs = qwen(4), qwen(54, 2, 1, layers=1), qwen_inputs(4)
    pruning = sk.Pruning(method, ratio)
    generation = decoder(target, draft, pruning=pruning, positions=positions).generate(inputs, 20)
    assert generation.tokens == greedy(target, inputs, 20)
    stats = generation.stats
    assert stats.visual_tokens == 64
    assert stats.kept_tokens == (64 if method == "none" else sk.keep_count(64, ratio))
    if method != "none":
        kept = generation.kept
        assert len(kept) == stats.kept_tokens and bool((kept[1:] > kept[:-1]).all())
        assert bool((inputs["input_ids"][0, kept] == VIDEO).all())
    assert (stats.stage1_tokens > 0) == (method == "specvlm")


def test_scores_are_the_mean_attention_of_the_text():
    model, inputs = qwen(5), qwen_inputs(5)
    generation = decoder(model, model).generate(inputs, 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    where = (inputs["input_ids"][0] == VIDEO).nonzero()[:, 0]
    first, last = int(where[0]), int(where[-1])
    text = torch.stack(attentions)[:, 0, :, last + 1 :, first : last + 1]
    assert generation.scores_start == first
    assert torch.allclose(generation.scores, text.mean((0, 1, 2)), atol=1e-6)
    want = sk.select_tokens(generation.scores[None], sk.keep_count(64, 0.9), 0.4)
    assert torch.equal(generation.kept, want.indices[0] + first)


@pytest.mark.parametrize("videos,images", [(2, 0), (1, 1), (0, 2), (3, 2), (0, 0)])
def test_several_videos_and_images(videos, images):
    target, draft = qwen(6), qwen(56, 2, 1, layers=1)
    inputs = qwen_inputs(6, videos, images)
    generation = decoder(target, draft).generate(inputs, 20)
    assert generation.tokens == greedy(target, inputs, 20)
    assert generation.stats.visual_tokens == 64 * videos + 8 * images


def test_vocabularies_with_different_padding():
    target, inputs = qwen(7), qwen_inputs(7)
    for vocab in (VOCAB - 5, VOCAB + 24):
        draft = qwen(7, vocab=vocab)
        assert decoder(target, draft).generate(inputs, 20).tokens == greedy(target, inputs, 20)


def test_stop_tokens_limits_and_streaming():
    target, inputs = qwen(8), qwen_inputs(8)
    both = decoder(target, target)
    whole = greedy(target, inputs, 40)
    stop = whole[17]
    first = whole.index(stop)
    for run in (both.generate, both.generate_autoregressive):
        pieces = []
        generation = run(inputs, 40, stop_tokens=[stop], on_tokens=pieces.append)
        assert generation.tokens == whole[: first + 1] == functools.reduce(operator.iadd, pieces, [])
        for limit in (1, 2, 7):
            assert run(inputs, limit, stop_tokens=[]).tokens == whole[:limit]
    target.generation_config.eos_token_id = [stop]
    assert decoder(target, target).generate(inputs, 40).tokens == whole[: first + 1]


def test_a_failing_callback_leaves_the_decoder_usable():
    target, inputs = qwen(9), qwen_inputs(9)
    both = decoder(target, qwen(59, 2, 1, layers=1))

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both.generate(inputs, 20, on_tokens=fail)
    assert both.generate(inputs, 20).tokens == greedy(target, inputs, 20)


def test_stats_add_up():
    target, inputs = qwen(10), qwen_inputs(10)
    stats = decoder(target, qwen(60, 2, 1, layers=1)).generate(inputs, 20).stats
    assert set(stats.seconds) == {
        "target_prefill", "rating", "select", "draft_prefill", "capture", "draft", "verify", "accept", "commit", "host"
    }  # fmt: skip
    assert all(seconds > 0 for seconds in stats.seconds.values())
    assert stats.new_tokens == 20 and stats.tokens_per_round == stats.tau + 1 == stats.accepted / stats.rounds + 1
    assert stats.prompt_tokens == inputs["input_ids"].shape[1] and stats.target_passes == 1 + stats.rounds
    assert stats.as_dict()["tau"] == stats.tau


def test_margins_are_gaps_between_the_best_two_logits():
    target, inputs = qwen(11), qwen_inputs(11)
    generation = decoder(target, target).generate_autoregressive(inputs, 5, with_margins=True)
    with torch.no_grad():
        full = torch.cat([inputs["input_ids"], torch.tensor([generation.tokens])], 1)
        mm = (full == VIDEO).int() * 2
        out = target(**{**inputs, "input_ids": full, "attention_mask": torch.ones_like(full), "mm_token_type_ids": mm})
    best = out.logits[0, -6:-1].topk(2).values
    assert torch.allclose(torch.tensor(generation.margins), best[:, 0] - best[:, 1], atol=1e-4)


@pytest.mark.parametrize("tree", [sk.TokenTree.from_paths([(0,), (1,)]), sk.DynamicTree(2, 2, 4)],
                         ids=["static", "dynamic"])  # fmt: skip
def test_sampling_is_reproducible_and_follows_the_target(tree):
    target, draft, inputs = qwen(12), qwen(12), qwen_inputs(12, text=4)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    settings = dict(temperature=0.25, top_k=4)

    def sampled(seed, speculative=True):
        both = decoder(target, draft, tree=tree, pruning=sk.Pruning("none"), sampling=Sampling(seed=seed, **settings))
        return (both.generate if speculative else both.generate_autoregressive)(inputs, 2).tokens

    assert sampled(3) == sampled(3)
    with torch.no_grad():
        first = sk.reference.target_distribution(target(**inputs).logits[:, -1], 0.25, 4)[0]
    draws = 400
    pairs = [sampled(seed) for seed in range(draws)]
    likely = int(first.argmax())
    ids = torch.cat([inputs["input_ids"], torch.tensor([[likely]])], 1)
    following = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids),
                 "mm_token_type_ids": (ids == VIDEO).int() * 2}  # fmt: skip
    with torch.no_grad():
        second = sk.reference.target_distribution(target(**following).logits[:, -1], 0.25, 4)[0]
    for got, want in (
        ([a for a, _ in pairs], first),
        ([b for a, b in pairs if a == likely], second),
    ):
        counts = torch.bincount(torch.tensor(got), minlength=VOCAB)
        assert int(counts[want == 0].sum()) == 0
        expected = want[want > 0] * len(got)
        assert chisquare(counts[want > 0].numpy(), expected.numpy()).pvalue > 1e-3


def test_clear_errors():
    target, draft, inputs = qwen(13), qwen(63, 2, 1, layers=1), qwen_inputs(13)
    with pytest.raises(ValueError, match="positions"):
        decoder(target, draft, positions="other")
    with pytest.raises(TypeError, match="Linear"):
        decoder(torch.nn.Linear(2, 2), draft)
    with pytest.raises(ValueError, match="LlavaOnevision"):
        decoder(target, llava(0))
    for name in ("tree", "pruning", "sampling"):
        with pytest.raises(TypeError, match=f"{name}: expected a"):
            decoder(target, draft, **{name: "paper"})
    with pytest.raises(TypeError, match="TokenTree or DynamicTree"):
        decoder(target, draft, tree=None)
    with pytest.raises(ValueError, match="needs 300 candidates"):
        decoder(target, draft, tree=sk.DynamicTree(1, 300, 4))
    with pytest.raises(ValueError, match="method"):
        sk.Pruning("other")
    with pytest.raises(ValueError, match="ratio"):
        sk.Pruning(ratio=1.0)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=0)
    both = decoder(target, draft)
    with pytest.raises(ValueError, match="max_new_tokens"):
        both.generate(inputs, 0)
    with pytest.raises(ValueError, match=r"need 1\d\d cache tokens, and max_cache_tokens is 50"):
        decoder(target, draft, max_cache_tokens=50).generate(inputs, 10)
    with pytest.raises(ValueError, match=r"input_ids of shape \[1,S\]"):
        both.generate({**inputs, "input_ids": inputs["input_ids"].repeat(2, 1)}, 5)
    with pytest.raises(ValueError, match="padding"):
        both.generate({**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}, 5)
    with pytest.raises(ValueError, match="64 video tokens, the vision tower gave 0"):
        both.generate({"input_ids": inputs["input_ids"]}, 5)
    short = {k: v[:, :-14] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match="text after the last visual token"):
        both.generate({**short, "input_ids": short["input_ids"][:, :-1], "attention_mask": None}, 5)


def test_tokenizers_must_agree():
    from specvlm_kernels.integrations.transformers import check_tokenizers

    class Tokenizer:
        def __init__(self, **vocab):
            self.vocab = vocab

        def get_vocab(self):
            return self.vocab

    check_tokenizers(Tokenizer(a=0, b=1), Tokenizer(a=0, b=1))
    with pytest.raises(ValueError, match="'b'"):
        check_tokenizers(Tokenizer(a=0, b=1), Tokenizer(a=0, b=2))
