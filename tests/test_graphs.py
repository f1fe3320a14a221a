"""Recorded rounds: the same tokens as call by call and as the target alone, and decoders that survive what fails."""

import pytest
import torch
from models import greedy, llava, llava_inputs, qwen, qwen_inputs
from recorder import CaptureError, record, recorded_graphs

import specvlm_kernels as sk
from specvlm_kernels import workspace
from specvlm_kernels.decoding import Sampling
from specvlm_kernels.graphs import Program, enabled
from specvlm_kernels.workspace import bucket

FAMILIES = {"qwen": (qwen, qwen_inputs), "llava": (llava, llava_inputs)}
TREES = {
    "chain1": sk.TokenTree.chain(1),
    "chain4": sk.TokenTree.chain(4),
    "paper": sk.SPECVLM_TREE,
    "wide": sk.TokenTree.from_paths([(i,) for i in range(80)] + [(0, 0), (0, 0, 0)]),
    "dynamic": sk.DynamicTree(depth=4, width=3, nodes=31),
    "dynamic chain": sk.DynamicTree(depth=4, width=1, nodes=5),
    "dynamic wide": sk.DynamicTree(depth=3, width=40, nodes=70),
}


@pytest.fixture
def graphs(monkeypatch):
    with recorded_graphs(monkeypatch) as made:
        yield made


def noisy(model, share):
    """The model with noise on its weights: a draft that is right now and then."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += share * parameter.std() * torch.randn_like(parameter)
    return model


def pair(make=qwen, seed=2, noise=0.05, **options):
    target = make(seed)
    return target, sk.SpeculativeDecoder.from_transformers(target, noisy(make(seed), noise), **options)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_rounds_give_the_targets_tokens(graphs, family, tree):
    """Several requests of one shape and then another: nothing of the first may be frozen in the graphs."""
    make, make_inputs = FAMILIES[family]
    target, decoder = pair(make, tree=TREES[tree], pruning=sk.Pruning("none"))
    paths = set()
    for seed in (1, 2, 3):
        inputs = make_inputs(seed)
        generation = decoder.generate(inputs, 40)
        assert generation.tokens == greedy(target, inputs, 40)
        assert generation.stats.graphs_captured == (seed == 1)
        paths.add(generation.stats.accepted)
    assert len(graphs) == 4 and len(paths) > 1  # one per phase, recorded once; other paths in every request
    longer = make_inputs(4, text=150)
    assert decoder.generate(longer, 40).tokens == greedy(target, longer, 40)
    assert len(graphs) == 8
    assert decoder.generate(make_inputs(5), 40).stats.graphs_captured == 0  # the first shape is still there


@pytest.mark.parametrize("with_margins", [False, True])
def test_recorded_plain_decoding(graphs, with_margins):
    target, decoder = pair()
    eager = sk.SpeculativeDecoder.from_transformers(target, target, graphs=False)
    for seed in (1, 2):
        inputs = qwen_inputs(seed)
        generation = decoder.generate_autoregressive(inputs, 20, with_margins=with_margins)
        assert generation.tokens == greedy(target, inputs, 20)
        want = eager.generate_autoregressive(inputs, 20, with_margins=with_margins)
        assert generation.margins == (pytest.approx(want.margins) if with_margins else None)
    assert len(graphs) == 2


@pytest.mark.parametrize("tree", ["paper", "dynamic"])
def test_recorded_sampling_tosses_anew_every_round(graphs, tree):
    target, draft = qwen(12), noisy(qwen(12), 0.05)
    for seed in (3, 4):
        options = dict(sampling=Sampling(temperature=0.8, seed=seed), pruning=sk.Pruning("none"), tree=TREES[tree])
        recorded, eager = (
            sk.SpeculativeDecoder.from_transformers(target, draft, graphs=on, **options) for on in (True, False)
        )
        inputs = qwen_inputs(12)
        want = eager.generate(inputs, 30).tokens
        assert recorded.generate(inputs, 30).tokens == want
        assert recorded.generate(inputs, 30).tokens == want  # the warm-up took no coins


def test_a_long_generation_does_not_drift(graphs):
    target, decoder = pair(noise=0.02)
    inputs = qwen_inputs(3)
    assert decoder.generate(inputs, 400).tokens == greedy(target, inputs, 400)


def test_the_recorder_refuses_what_a_capture_refuses():
    x = torch.arange(4.0)
    for step in (
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: bool(x[0] > 1),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.tensor([1.0]) + x,
    ):
        with pytest.raises(CaptureError):
            record(step, None)
    doubled = torch.zeros(4)
    replay = record(lambda: doubled.copy_(x * 2), None)
    x += 1
    replay()
    assert torch.equal(doubled, x * 2)


class Failing:
    """Makes the model raise at one of its passes."""

    def __init__(self, model, at, error):
        self.forward, self.at, self.error, self.model = model.forward, at, error, model
        model.forward = self

    def __call__(self, *args, **kwargs):
        self.at -= 1
        if self.at == 0:
            self.model.forward = self.forward
            raise self.error
        return self.forward(*args, **kwargs)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("full"), RuntimeError("broken")],
                         ids=["ctrl-c", "oom", "error"])  # fmt: skip
@pytest.mark.parametrize("at", [1, 3, 4, 5, 6])  # prefill (2 passes), warm-up, recording, eager prefill of the next
def test_what_fails_leaves_the_decoder_usable(graphs, error, at):
    target, decoder = pair()
    inputs, other = qwen_inputs(1), qwen_inputs(2)
    Failing(decoder.target, at, error)
    with pytest.raises(type(error)):
        for _ in range(2):  # 4 target passes make the first request, 2 the prefill of the second
            decoder.generate(inputs, 30)
    if isinstance(error, torch.OutOfMemoryError):
        assert not decoder._workspaces._sides and not decoder._workspaces._programs
    for each in (other, inputs):
        assert decoder.generate(each, 30).tokens == greedy(target, each, 30)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_failing_callback(graphs, recorded):
    target, decoder = pair(graphs=recorded)
    inputs = qwen_inputs(1)
    for fail_at in (1, 2, 4):
        calls = 0

        def fail(_, fail_at=fail_at):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            decoder.generate(inputs, 30, on_tokens=fail)
        assert decoder.generate(inputs, 30).tokens == greedy(target, inputs, 30)


def test_no_round_runs_in_vain():
    target, decoder = pair()
    launches = []
    launch = Program.launch
    inputs = qwen_inputs(1)
    tokens = greedy(target, inputs, 30)
    for stop in (tokens[0], tokens[7], tokens[29]):
        launches.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Program, "launch", lambda self: (launches.append(1), launch(self))[1])
            generation = decoder.generate(inputs, 30, stop_tokens=[stop])
        assert generation.tokens == tokens[: tokens.index(stop) + 1]
        assert len(launches) == generation.stats.rounds


def test_the_callback_runs_while_the_next_round_does(monkeypatch):
    events = []
    launch, wait = Program.launch, Program.wait
    monkeypatch.setattr(Program, "launch", lambda self: (events.append("launch"), launch(self))[1])
    monkeypatch.setattr(Program, "wait", lambda self, s: (events.append("wait"), wait(self, s))[1])
    _, decoder = pair()
    decoder.generate(qwen_inputs(1), 12, on_tokens=lambda _: events.append("told"))
    rounds = events.count("launch")
    assert events == ["launch", "told", "wait"] * rounds + ["told"]


def test_a_request_that_does_not_fit_fails_before_prefill(monkeypatch):
    target, decoder = pair(pruning=sk.Pruning("none"))
    inputs = qwen_inputs(1)
    length = inputs["input_ids"].shape[1]
    caches = sum(m.cache_bytes(bucket(length + 30 + 26)) for m in (decoder.target, decoder.draft))
    working = max(m.prefill_bytes(length) for m in (decoder.target, decoder.draft))
    cache = decoder.target.new_cache(bucket(length + 30 + 26))
    assert decoder.target.cache_bytes(cache.capacity) == cache.keys.nbytes + cache.values.nbytes

    monkeypatch.setattr(workspace, "free_bytes", lambda device: caches + working - 1000)
    monkeypatch.setattr(decoder.target, "forward", lambda *_, **__: pytest.fail("a pass was run"))
    with pytest.raises(MemoryError, match=r"for the target.*for the draft.* 1000 bytes more than is free"):
        decoder.generate(inputs, 30)
    monkeypatch.undo()
    assert decoder.generate(inputs, 30).tokens == greedy(target, inputs, 30)
    # what earlier requests left is given up before a request is refused
    longer = qwen_inputs(1, text=300)
    kept = []

    def free(device):
        kept.append(len(decoder._workspaces._sides))
        return 0 if kept[-1] else 1 << 40

    monkeypatch.setattr(workspace, "free_bytes", free)
    assert decoder.generate(longer, 30).tokens == greedy(target, longer, 30)
    assert kept[0] == 2 and kept[-1] == 0


def test_few_shapes_are_kept():
    _, decoder = pair()
    for text in (10, 80, 160, 300, 400):
        decoder.generate(qwen_inputs(1, text=text), 10)
        assert len(decoder._workspaces._sides) <= workspace.MAX_KEPT + 1
    decoder.release()
    assert not decoder._workspaces._sides and not decoder._workspaces._programs


def test_buckets():
    for tokens in [*range(1, 3000), 16_384, 20_001, 131_072, 10**6]:
        assert tokens <= bucket(tokens) <= max(tokens * 9 / 8, tokens + 63)
    assert len({bucket(tokens) for tokens in range(16_384, 32_768)}) <= 9


def test_programs():
    log, counter, result = [], torch.zeros(1), torch.zeros(1)

    def count():
        counter.add_(1)
        result.copy_(counter)

    program = Program([("a", count), ("a", count), ("b", lambda: log.append("b"))], [counter], result, graphs=False)
    assert not program.ready
    program.prepare()
    assert program.ready and log == [] and counter == 0
    seconds = {}
    program.launch()
    assert program.wait(seconds) == [2.0]
    program.launch()
    assert program.wait(seconds) == [4.0] and log == ["b", "b"]
    assert set(seconds) == {"a", "b"} and all(s > 0 for s in seconds.values())


def test_a_recording_puts_the_state_back_and_is_all_or_nothing(graphs):
    counter, result, broken = torch.zeros(1), torch.zeros(1), [True]

    def count():
        counter.add_(1)
        result.copy_(counter)

    def fail():
        if broken[0] and len(graphs) == 1:
            raise KeyboardInterrupt

    program = Program([("a", count), ("b", fail)], [counter], result, graphs=True)
    with pytest.raises(KeyboardInterrupt):
        program.prepare()
    assert not program.ready and counter == 0
    broken[0] = False
    program.prepare()
    assert program.ready and counter == 0
    program.launch()
    assert program.wait({}) == [1.0]


def test_graphs_where_there_is_no_gpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not enabled(None, cpu) and not enabled(False, gpu) and enabled(None, gpu) and enabled(True, gpu)
    with pytest.raises(ValueError, match="graphs: CUDA graphs need an NVIDIA GPU"):
        enabled(True, cpu)
    with pytest.raises(ValueError, match="graphs"):
        pair(graphs=True)
    monkeypatch.setattr("specvlm_kernels._env.CHECK", True)
    assert not enabled(None, gpu)
    with pytest.raises(ValueError, match="SPECVLM_CHECK"):
        enabled(True, gpu)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "family,tree,dtype",
    [
        *(("qwen", tree, torch.float32) for tree in TREES),
        ("llava", "paper", torch.float32),
        ("qwen", "paper", torch.bfloat16),
        ("llava", "paper", torch.bfloat16),
    ],
    ids=str,
)
def test_cuda_graphs_equal_calls(family, tree, dtype):
    """The same kernels on the same tensors: equal to the bit, several requests on the same graphs."""
    make, make_inputs = FAMILIES[family]
    target, draft = make(2).to("cuda", dtype), noisy(make(2), 0.05).to("cuda", dtype)
    replayed, called = (
        sk.SpeculativeDecoder.from_transformers(target, draft, tree=TREES[tree], graphs=on) for on in (True, False)
    )
    for seed in (1, 2, 3):
        inputs = {k: v.cuda() for k, v in make_inputs(seed).items()}
        got, want = replayed.generate(inputs, 60), called.generate(inputs, 60)
        assert got.tokens == want.tokens and got.stats.accepted == want.stats.accepted
        assert got.stats.graphs_captured == (seed == 1) and want.stats.graphs_captured == 0
        assert got.stats.peak_bytes > 0
    plain = [d.generate_autoregressive(inputs, 60).tokens for d in (replayed, called)]
    assert plain[0] == plain[1]
    if dtype == torch.float32:
        assert got.tokens == plain[0]


@pytest.mark.gpu
@pytest.mark.parametrize("tree", ["paper", "dynamic"])
def test_a_round_does_not_wait_for_the_gpu(monkeypatch, tree):
    """PyTorch raises at every synchronising call while a round is launched call by call."""
    target = qwen(2).cuda()
    decoder = sk.SpeculativeDecoder.from_transformers(target, target, graphs=False, tree=TREES[tree])
    inputs = {k: v.cuda() for k, v in qwen_inputs(1).items()}
    want = decoder.generate(inputs, 30).tokens  # kernels are compiled here
    launch = Program.launch

    def strict(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Program, "launch", strict)
    assert decoder.generate(inputs, 30).tokens == want
    assert decoder.generate_autoregressive(inputs, 30).tokens == want


@pytest.mark.gpu
@pytest.mark.parametrize("tree", ["paper", "dynamic"])
def test_no_memory_is_allocated_in_a_round(tree):
    target = qwen(2).cuda()
    decoder = sk.SpeculativeDecoder.from_transformers(target, target, tree=TREES[tree])
    inputs = {k: v.cuda() for k, v in qwen_inputs(1).items()}
    decoder.generate(inputs, 60)
    seen = []
    allocations = lambda _: seen.append(torch.cuda.memory_stats()["allocation.all.allocated"])  # noqa: E731
    decoder.generate(inputs, 60, on_tokens=allocations)
    assert len(set(seen[:-1])) == 1, seen


@pytest.mark.gpu
def test_a_full_gpu_says_what_is_missing():
    target = qwen(2).cuda()
    decoder = sk.SpeculativeDecoder.from_transformers(target, target)
    inputs = {k: v.cuda() for k, v in qwen_inputs(1).items()}
    with pytest.raises(MemoryError, match="bytes more than is free"):
        decoder.generate(inputs, 1 << 33)
    assert len(decoder.generate(inputs, 30).tokens) == 30
