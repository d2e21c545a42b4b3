"""The benchmark measures what it says: equal work on both sides, no wait in a step, an honest table."""

import copy
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pvae
from pvae.data import from_tensors
from pvae.experiments import SpecError
from pvae.experiments.bench import (
    CASES,
    Case,
    SyncCounter,
    alignment,
    count_syncs,
    evaluation,
    flow_prior,
    format_table,
    interleave,
    ladder,
    posteriors,
    run_bench,
)
from pvae.experiments.bench.hand_ladder import HandLadder
from pvae.experiments.bench.hand_loops import CapturedLoop, HandLoop, adamax
from pvae.experiments.bench.timing import row as make_row
from pvae.experiments.bench.training import training
from pvae.inference import ELBO

ROOT = Path(__file__).parents[1]
KEPT = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
TINY = Case((1, 4, 4), z_dim=2, hidden=(8,), steps=2, eager_target=2.0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks and few draws in place of the real ones."""
    for name in CASES:
        monkeypatch.setitem(CASES, name, TINY)
    monkeypatch.setattr(evaluation, "_NUM_IMAGES", 5)
    monkeypatch.setattr(evaluation, "_NUM_PARTICLES", 30)
    monkeypatch.setattr(flow_prior, "_STEPS", 2)
    for name, networks in (("five", posteriors._mlp), ("five-conv", posteriors._conv)):
        monkeypatch.setitem(posteriors.NETWORKS, name, posteriors.Case(networks, (2,), steps=1))
    small = {name: replace(case, hidden=(8,), z_dim=2, steps=2) for name, case in alignment.ALIGNED.items()}
    monkeypatch.setattr(alignment, "ALIGNED", small)
    ladders = {
        name: replace(ladder.LADDERS["digits"], channels=2, hidden=4, steps=1) for name in ladder.LADDERS
    }
    monkeypatch.setattr(ladder, "LADDERS", ladders)


@pytest.mark.parametrize("name", CASES)
def test_loop_by_hand_does_the_same_work(name: str, float64: None) -> None:
    case = CASES[name]
    program, net = case.program(), case.hand()
    encoder = dict(program.guide.named_parameters())
    head = [encoder.pop(key) for key in ("encoder.head.weight", "encoder.head.bias")]
    ours = [*encoder.values(), *head, *program.model.parameters()]
    theirs = list(net.parameters())
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    for parameter, value in zip(theirs, ours, strict=True):
        parameter.data.copy_(value.data)

    x = (torch.rand(3, *case.x_shape) < 0.5).double()
    torch.manual_seed(1)
    loss = ELBO().terms(program.model, program.guide, x).loss
    torch.manual_seed(1)
    by_hand = net.loss(x)
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=0.0)
    gradients, by_hand_gradients = torch.autograd.grad(loss, ours), torch.autograd.grad(by_hand, theirs)
    for mine, hand in zip(gradients, by_hand_gradients, strict=True):
        torch.testing.assert_close(mine, hand, rtol=1e-9, atol=1e-12)


def test_loop_by_hand_learns() -> None:
    levels = (torch.rand(256, 1, 4, 4) < 0.9).to(torch.uint8) * 255
    loop = HandLoop(TINY.hand(), levels, batch_size=16)
    first = loop.run(16)
    for _ in range(20):
        last = loop.run(16)
    assert last < 0.8 * first


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_never_waits_for_its_device(name: str, engine: str) -> None:
    case = CASES[name]
    levels = torch.randint(256, (16, *case.x_shape), dtype=torch.uint8)
    assert count_syncs(case.program(), from_tensors(levels, binarize="dynamic").train, engine) == 0


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("kind", ["plain", "direct", "flow"])
@pytest.mark.parametrize("name", alignment.ALIGNED)
def test_an_aligned_step_never_waits_either(name: str, kind: alignment.Kind, engine: str) -> None:
    case = replace(alignment.ALIGNED[name], steps=1)
    split = case.split()
    assert count_syncs(case.program(kind, len(split)), split, engine) == 0


def test_an_aligned_step_does_what_the_plain_one_does_and_the_alignment() -> None:
    """The three programs differ by nothing but the factor, whose targets the prior can have."""
    for name, case in alignment.ALIGNED.items():
        models = {}
        kinds: tuple[alignment.Kind, ...] = ("plain", "direct", "flow")
        for kind in kinds:
            torch.manual_seed(0)
            models[kind] = case.program(kind, 64).model
        plain = models.pop("plain")
        for kind, model in models.items():
            aligner: Any = model.aligner
            assert type(aligner.target).__name__ == {"direct": "Target", "flow": "FlowTarget"}[kind]
            assert callable(aligner.schedule)
            assert len(aligner.target) == 64
            for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
                assert torch.equal(ours, theirs), name
    sizes = {name: [case.x_shape, case.hidden, case.z_dim] for name, case in alignment.ALIGNED.items()}
    assert sizes == {
        "784-300-300-10": [(1, 28, 28), (300, 300), 10],
        "50-25-2": [(50,), (25,), 2],
        "784-400-400-20": [CASES["medium"].x_shape, CASES["medium"].hidden, CASES["medium"].z_dim],
    }


@pytest.mark.parametrize("name", ladder.LADDERS)
def test_a_ladder_by_hand_does_the_same_work(name: str, float64: None) -> None:
    assert ladder.disagreement(ladder.LADDERS[name]) < 1e-12


def test_a_ladder_by_hand_that_does_other_work_is_not_timed(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = HandLadder._bound_of_u
    monkeypatch.setattr(HandLadder, "_bound_of_u", lambda self, u: 1.001 * bound(self, u))
    with pytest.raises(RuntimeError, match="the loop by hand does other work than the library at 'tiny'"):
        ladder.time_ladder(torch.device("cpu"), rounds=1, engines=("eager",))


def test_a_ladder_by_hand_learns() -> None:
    case = ladder.LADDERS["digits"]
    levels = (torch.rand(256, 1, 8, 8) < 0.9).to(torch.uint8) * 255
    loop = HandLoop(case.hand(), levels, batch_size=32, optimizer=adamax)
    first = loop.run(8)
    for _ in range(5):
        last = loop.run(8)
    assert last < 0.8 * first


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("pseudoinputs", [True, False])
@pytest.mark.parametrize("name", ladder.LADDERS)
def test_a_step_of_a_ladder_never_waits_either(name: str, pseudoinputs: bool, engine: str) -> None:
    case = replace(ladder.LADDERS[name], steps=1)
    split = from_tensors(case.levels()[:4], binarize="dynamic").train
    assert ladder.ladder_syncs(case.program(pseudoinputs), split, engine) == 0


def test_what_stays_on_the_host_is_no_wait() -> None:
    counter, other = torch.ones(()), torch.ones(())
    with SyncCounter([counter]) as waits:
        counter.item()
        other.item()
    assert waits.count == 1


@pytest.mark.parametrize(
    "wait", [torch.Tensor.item, bool, torch.Tensor.nonzero, lambda x: torch.equal(x, x + 1)]
)
def test_a_planted_wait_is_counted(wait: object) -> None:
    assert callable(wait)
    x = torch.ones(())
    with SyncCounter() as counter:
        wait(x + x)
    assert counter.count == 1


def test_interleaving_reverses_every_second_round() -> None:
    calls: list[str] = []
    ticks = itertools.count()
    contenders = {name: partial(calls.append, name) for name in "abc"}
    seconds = interleave(contenders, rounds=3, clock=lambda: float(next(ticks)))
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert seconds == {name: [1.0, 1.0, 1.0] for name in "abc"}


def test_ratio_is_the_median_of_the_rounds() -> None:
    seconds = {"ours": [2.0, 9.0, 4.0], "loop": [1.0, 1.0, 4.0]}
    row = make_row("small", "ours", "loop", seconds, units=2, target=2.0, syncs=0)
    assert (row["ratio"], row["ours_ms"], row["yardstick_ms"]) == (2.0, 2000.0, 500.0)
    assert "2.00 met" in format_table([row])
    assert "1.99 missed" in format_table([row | {"target": 1.99}])


def test_smoke(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "results" / "cpu.json"
    before = torch.get_num_threads()
    rows = run_bench(device="cpu", rounds=2, names=None, engines=("eager",), threads=1, out=out)
    assert [(row["benchmark"], row["yardstick"], row["rounds"]) for row in rows] == [
        *((name, yardstick, 2) for name in CASES for yardstick in ("loop", "stock SVI")),
        ("evaluation", "decoder", 2),
        ("evaluation", "decoder + density", 2),
        ("cvae-nf", "N(0, I)", 2),
        *((name, "diagonal, 2 latents", 2) for name in ("five", "five-conv") for _ in range(5)),
        *(("alignment", f"plain, {size}", 2) for size in alignment.ALIGNED for _ in range(2)),
        *(
            ("ladder", f"{yardstick}, {size}", 2)
            for size in ladder.LADDERS
            for yardstick in ("plain", "loop", "loop, channels last")
        ),
    ]
    aligned = [row for row in rows if row["benchmark"] == "alignment"]
    assert [row["ours"] for row in aligned[-2:]] == ["eager, direct", "eager, flow"]
    assert [row["target"] for row in aligned[-2:]] == [1.1, None]
    assert {row["ours"] for row in rows if row["benchmark"] == "ladder"} == {"eager, dvp"}
    assert {row["syncs"] for row in rows if row["benchmark"] == "ladder"} == {0}
    assert all(row["ratio"] > 0 for row in rows)  # type: ignore[operator]
    written = json.loads(out.read_text())
    assert written["rows"] == rows
    assert written["machine"]["threads"] == 1
    assert format_table(rows) in out.with_suffix(".md").read_text()
    assert torch.get_num_threads() == before


def test_decoder_passes_are_those_of_the_evaluation(tiny: None) -> None:
    """The yardstick sees every particle of every image once, in more than one chunk or block."""
    program = TINY.program()
    x = torch.zeros(70, *TINY.x_shape)
    shapes = evaluation._decoder_inputs(
        program.model.decoder,  # type: ignore[arg-type]
        lambda: pvae.log_likelihood(*program, x, num_particles=200, progress=False),
    )
    assert len(shapes) > 1
    assert sum(shape[:-1].numel() for shape in shapes) == 70 * 200


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_documented_table_is_the_measured_one(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    named = {str(row["benchmark"]).partition(":")[0] for row in rows} & {"recipe", "peers"}
    assert all(row["ratio"] is None or row["rounds"] >= (3 if named else 11) for row in rows)
    assert format_table(rows) in (ROOT / "docs" / "benchmarks.md").read_text()


def test_an_engine_that_falls_back_is_not_timed_under_its_name() -> None:
    levels = torch.randint(256, (16, *TINY.x_shape), dtype=torch.uint8)
    split = from_tensors(levels, binarize="dynamic").train
    run = training(TINY.program(), split, "cuda_graph", steps=2, batch_size=4, compile=False)
    with pytest.raises(SpecError, match="engine 'cuda_graph' "):
        run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_loop_learns_as_the_loop_does() -> None:
    levels = ((torch.rand(256, 1, 4, 4) < 0.9).to(torch.uint8) * 255).cuda()
    net = TINY.hand().cuda()
    loops: list[CapturedLoop | HandLoop] = [
        CapturedLoop(copy.deepcopy(net), levels, 16),
        HandLoop(net, levels, 16),
    ]
    first, last = [], []
    for loop in loops:
        first.append(loop.run(16))
        for _ in range(20):
            loss = loop.run(16)
        last.append(loss)
    assert last[0] < 0.8 * first[0]
    assert last[0] == pytest.approx(last[1], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_is_measured(tiny: None) -> None:
    engines = ("cuda_graph",)
    rows = run_bench(device="cuda", rounds=1, names=("small",), engines=engines, threads=1, out=None)
    assert [row["yardstick"] for row in rows] == ["loop", "loop, captured", "stock SVI"]


@pytest.mark.slow
def test_graph_engine_is_measured(tiny: None) -> None:
    rows = run_bench(device="cpu", rounds=1, names=("small",), engines=("graph",), threads=1, out=None)
    assert [row["yardstick"] for row in rows] == ["loop", "loop, compiled", "stock SVI"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"names": ("large",)},
            "benchmark must be one of small, medium, conv, evaluation, cvae-nf, five, "
            "five-conv, alignment, ladder, peers, recipes, recipe:NAME, got 'large'",
        ),
        ({"engines": ("jit",)}, "engine must be one of eager, traced, graph, cuda_graph, got 'jit'"),
        ({"engines": ("cuda_graph",)}, "engine 'cuda_graph' needs a CUDA device, got cpu"),
        ({"rounds": 0}, "must be positive, got 0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(settings: dict[str, object], said: str) -> None:
    arguments = {
        "device": "cpu",
        "rounds": 1,
        "names": None,
        "engines": ("eager",),
        "threads": 1,
        "out": None,
    }
    with pytest.raises(SpecError, match=said):
        run_bench(**(arguments | settings))  # type: ignore[arg-type]
