"""Several processes train and evaluate as one does on their data together, write once, and end together."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import torch._dynamo  # wrapping a module for several processes imports it: once for all the children
from torch import Tensor, nn

import pvae
from pvae.alignment import align
from pvae.data import Data, from_tensors
from pvae.evaluation import nested_likelihood
from pvae.inference import ELBO, PeerFailure, Team, Trainer, fit
from pvae.inference.distributed import Pulse, shared_engine
from pvae.inference.engine import EagerEngine
from pvae.inference.loop import Loop
from pvae.inference.program import program_state
from pvae.ops import batch_mean, batch_mean_gradients, sharing_batches

from ..alignment import programs as aligned_programs
from ..evaluation import test_nested as diffused
from .processes import Ended, run_together
from .profiled import profiled_programs
from .programs import LinearGuide, LinearModel

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported torch"),
    # Said from Python 3.12 on, of threads of torch that the children do not use.
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:a flow takes up the scale", "ignore:.* of the targets lie above"),
]

Pair = tuple[nn.Module, nn.Module]


def data() -> Data:
    generator = torch.Generator().manual_seed(5)
    x = 0.4 * torch.randn(260, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    return from_tensors(x[:200], valid=x[200:], name="linear")


def linear(**options: Any) -> Pair:
    torch.manual_seed(0)
    return LinearModel(**options), LinearGuide(**options)


def aligned(**settings: Any) -> Pair:
    pair = aligned_programs.programs()
    return tuple(align(*pair, aligned_programs.density(), **settings))  # type: ignore[return-value]


def aligned_data() -> Data:
    return from_tensors(aligned_programs.data(), aligned_programs.data()[:10])


class Normed(LinearGuide):
    """Keeps running statistics of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(self.norm(x), y)


@contextmanager
def same_noise() -> Iterator[None]:
    """Let every process draw the noise of the whole batch, as one process does, and take its rows of it."""
    normal: Any = torch.distributions.normal
    team: Any = Team.find()
    draw, seed, calibrate = normal._standard_normal, Team.seed, Loop._calibrate

    def rows(shape: Any, dtype: Any, device: Any) -> Tensor:
        own = shape[-2]
        whole = draw(torch.Size((*shape[:-2], own * team.size, shape[-1])), dtype, device)
        return whole[..., own * team.rank : own * (team.rank + 1), :]

    def by_one(self: Loop) -> None:
        normal._standard_normal = draw
        calibrate(self)

    normal._standard_normal = rows
    Team.seed = lambda self, seed: seed  # type: ignore[method-assign]
    Loop._calibrate = by_one  # type: ignore[method-assign]
    try:
        yield
    finally:
        normal._standard_normal = draw
        Team.seed = seed  # type: ignore[method-assign]
        Loop._calibrate = calibrate  # type: ignore[method-assign]


def arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


def trained(make: Callable[[], Pair], given: Data, **settings: Any) -> Any:
    """History, and all that training changed."""
    model, guide = make()
    with same_noise():
        run = fit(model, guide, given, batch_size=8, progress=False, **settings)
    state = program_state(model, guide) | getattr(model, "training_state", dict)()
    return run.history, arrays({n: t for n, t in state.items() if n not in ("index", "digest")}), run.best


def results(ended: list[Ended]) -> list[Any]:
    assert [(one.raised, one.exitcode) for one in ended] == [(None, 0)] * len(ended)
    return [one.returned for one in ended]


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


FITS: dict[str, tuple[Callable[[], Pair], dict[str, Any]]] = {
    "elbo": (
        linear,
        {
            "epochs": 2,
            "grad_clip": 0.5,
            "ema": 0.9,
            "schedule": "cosine",
            "beta_warmup": 1,
            "patience": 1,
            "lr": 1e-2,
        },
    ),
    "iwae": (linear, {"steps": 12, "objective": "iwae", "num_particles": 3, "engine": "traced"}),
    "dreg": (linear, {"steps": 12, "objective": "dreg", "num_particles": 2}),
    "ladder": (lambda: linear(ladder=True), {"steps": 12, "free_bits": 0.25, "optimizer": "sgd", "lr": 0.05}),
    "sigma": (profiled_programs, {"steps": 30, "lr": 1e-2, "log_every": 7}),
    "sigma traced": (profiled_programs, {"steps": 12, "lr": 1e-2, "engine": "traced"}),
    "aligned": (lambda: aligned(offset="learn"), {"steps": 12, "lr": 1e-2}),
    "rms": (lambda: aligned(preset="released"), {"steps": 12, "lr": 1e-2}),
    "flow": (lambda: aligned(kind="flow"), {"steps": 12, "lr": 1e-2, "log_every": 5}),
}


@pytest.mark.parametrize("name", FITS)
def test_a_run_of_two_processes_is_that_of_one_with_the_same_noise(name: str, tmp_path: Path) -> None:
    make, settings = FITS[name]
    given = aligned_data() if name in ("aligned", "rms", "flow") else data()
    first, second = results(run_together(lambda: trained(make, given, **settings), tmp_path))
    # All the processes have the same bytes, and one process their values up to the rounding of sums.
    assert first[0] == second[0]
    assert alike(first[1], second[1])
    history, state, best = trained(make, given, **settings)
    assert len(history) == len(first[0])
    assert first[2] == pytest.approx(best, rel=1e-5)
    for ours, theirs in zip(history, first[0], strict=True):
        assert theirs == pytest.approx(ours, rel=2e-5, abs=2e-5)
    for tensor, array in state.items():
        np.testing.assert_allclose(first[1][tensor], array, rtol=1e-4, atol=2e-5, err_msg=tensor)
    start = arrays(program_state(*make()))
    assert any(not np.allclose(start[n], state[n], rtol=1e-3, atol=1e-4) for n in start)


def gradients(names: tuple[str, ...] = ("eager", "traced")) -> list[list[Any]]:
    """Gradients of one batch, half of which each process sees."""
    team, found = Team.find(), []
    x = data().train.x[:12].double()
    own = x.chunk(team.size)[team.rank]
    for name in names:
        model, guide = (program.double() for program in linear(ladder=True))
        model.get_parameter("top.bias").requires_grad_(False)
        objective = ELBO("elbo", free_bits=0.25)
        engine = shared_engine(name, objective, model, guide, False, team)
        with same_noise(), team.sharing(), pyro.validation_enabled(False):
            torch.manual_seed(3)
            engine((own,), torch.tensor(0.7, dtype=torch.float64))
        found.append([None if p.grad is None else p.grad.numpy().copy() for p in parameters(model, guide)])
    return found


def parameters(*programs: nn.Module) -> list[nn.Parameter]:
    return [parameter for program in programs for parameter in program.parameters()]


def test_gradients_are_those_of_the_whole_batch_to_the_rounding_of_a_sum(tmp_path: Path) -> None:
    alone = gradients()
    for found in results(run_together(gradients, tmp_path)):
        for ours, theirs in zip(alone, found, strict=True):
            assert [g is None for g in ours] == [g is None for g in theirs]
            for a, b in zip(ours, theirs, strict=True):
                if a is not None:
                    np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


def test_a_parameter_without_a_gradient_stays_as_it_is(tmp_path: Path) -> None:
    # The top of a ladder is not used without one: its gradient is absent, not zero.
    def go() -> Any:
        model, guide = linear()
        before = arrays(program_state(model, guide))
        fit(model, guide, data(), steps=3, batch_size=8, optimizer="adamw", lr=0.1, progress=False)
        after = arrays(program_state(model, guide))
        return [name for name in before if np.array_equal(before[name], after[name])]

    unused = ["model.top.weight", "model.top.bias", "guide.below.weight", "guide.below.bias"]
    assert results(run_together(go, tmp_path)) == [unused, unused]


def test_running_statistics_are_the_first_processes(tmp_path: Path) -> None:
    def go() -> Any:
        torch.manual_seed(0)
        model, guide = LinearModel(), Normed()
        run = fit(model, guide, data(), epochs=1, batch_size=20, progress=False)
        return arrays(program_state(model, guide)), run.history

    first, second = results(run_together(go, tmp_path))
    assert alike(first[0], second[0])
    assert first[1] == second[1]
    assert first[0]["guide.norm.running_mean"].any()


def test_processes_draw_noise_of_their_own() -> None:
    assert Team().seed(7) == 7
    assert len({Team(rank, 3).seed(7) for rank in range(3)}) == 3
    assert Team(1, 3).seed(7) != Team(1, 3).seed(8)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_together_the_batches_in_their_order(size: int) -> None:
    split = data().train
    parts = [split.share(number, size) for number in range(size)]
    options: dict[str, Any] = {"seed": 3, "epoch": 1, "drop_last": True, "start": 2}
    whole = [batch.index.tolist() for batch in split.batches(60, **options)]
    cut = [[batch.index.tolist() for batch in part.batches(60, **options)] for part in parts]
    assert [list(chain.from_iterable(shares)) for shares in zip(*cut, strict=True)] == whole
    assert all(len(share) == 60 // size for shares in cut for share in shares)
    # An incomplete last batch is cut as well as can be, and a share without data left out.
    few, options = split[:19], {"seed": 3, "epoch": 1, "drop_last": False}
    last = [batch.index for i in range(size) for batch in few.share(i, size).batches(9, **options, start=2)]
    assert [len(index) for index in last] == [1]
    assert last[0].tolist() == next(iter(few.batches(9, **options, start=2))).index.tolist()
    with pytest.raises(ValueError, match=r"number must lie in 0 \.\.\. 1, one of 2 shares, got 2"):
        split.share(2, 2)


def broken(out: Path, stop: int) -> Any:
    """Train a run that its second process is told to stop after a step, then go on with it."""
    step = Trainer.step

    def stopping(self: Trainer, batch: Any) -> None:
        step(self, batch)
        if self.step_count == stop and self.team.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def run(resume: bool) -> Any:
        model, guide = linear()
        settings: dict[str, Any] = {"epochs": 3, "batch_size": 18, "ema": 0.9, "log_every": 4}
        run = fit(model, guide, data(), **settings, out=out, resume=resume, progress=False)
        return run.history, arrays(program_state(model, guide))

    if not stop:
        return run(resume=False)
    Trainer.step = stopping  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            run(resume=False)
    finally:
        Trainer.step = step  # type: ignore[method-assign]
    taken = json.loads((out / "checkpoints" / "last.json").read_text())["step"]
    return *run(resume=True), taken


@pytest.mark.parametrize("size", [2, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(size: int, tmp_path: Path) -> None:
    def both() -> Any:
        return broken(tmp_path / "whole", 0), broken(tmp_path / "cut", 13)

    for (history, state), (resumed, again, taken) in results(run_together(both, tmp_path, size=size)):
        assert resumed == history
        assert alike(again, state)
        assert 13 <= taken < 33
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "cut/metrics.jsonl").read_text()
    # Another number of processes would have other draws.
    with pytest.raises(ValueError, match=f"number of processes must be {size}, as in the run .*, got 1"):
        fit(*linear(), data(), epochs=4, batch_size=18, out=tmp_path / "cut", resume=True, progress=False)


def test_the_processes_hear_of_a_signal_after_the_same_step(tmp_path: Path) -> None:
    def go() -> int:
        team = Team.find()
        pulse, step = Pulse(team), 0
        while step < 100_000:
            step += 1
            if pulse.heard(asked=step > 40 and team.rank == 1):
                break
        return step

    first, second = results(run_together(go, tmp_path))
    assert 40 < first == second < 100_000
    alone = Pulse(Team())
    assert [alone.heard(False), alone.heard(True)] == [False, True]


REFUSED: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "batch": (lambda rank: {"batch_size": 9}, "batch_size must be divisible by the 2 processes .*, got 9"),
    "seed": (lambda rank: {"seed": rank}, "seed must be the same in all 2 processes, got 0, 1"),
    "steps": (lambda rank: {"steps": 2 + rank}, "steps must be the same in all 2 processes, got 2, 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_processes_that_cannot_train_together_are_refused(name: str, tmp_path: Path) -> None:
    settings, said = REFUSED[name]

    def go() -> None:
        own: dict[str, Any] = {"steps": 2, "batch_size": 8} | settings(Team.find().rank)
        with pytest.raises(ValueError, match=said):
            fit(*linear(), data(), progress=False, **own)

    results(run_together(go, tmp_path))


def test_what_one_process_raises_ends_all_with_its_sentence(tmp_path: Path) -> None:
    def callback(run: Any, row: Any) -> None:
        raise ArithmeticError("enough")

    def go() -> None:
        fit(*linear(), data(), steps=4, batch_size=8, progress=False, callbacks=[callback], log_every=2)

    def occupied() -> None:
        fit(*linear(), data(), steps=4, batch_size=8, progress=False, out=tmp_path / "run")

    kinds = [(one.kind, one.raised) for one in run_together(go, tmp_path)]
    assert kinds == [("ArithmeticError", "enough"), ("PeerFailure", "enough")]
    results(run_together(occupied, tmp_path))
    first, second = run_together(occupied, tmp_path)
    assert (first.kind, second.kind) == ("ValueError", "PeerFailure")
    assert first.raised == second.raised
    assert first.raised is not None
    assert "holds a run: pass resume=True" in first.raised


def test_a_loss_that_is_not_finite_in_one_process_is_told_by_all(tmp_path: Path) -> None:
    class Failing(LinearModel):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            broken = Team.find().rank == 1 and torch.is_grad_enabled()
            return super().forward(x * float("inf") if broken else x)

    def go() -> None:
        fit(Failing(), LinearGuide(), data(), steps=4, batch_size=8, progress=False, out=tmp_path / "run")

    first, second = run_together(go, tmp_path)
    assert (first.kind, second.kind) == ("NonFiniteLoss", "NonFiniteLoss")
    assert first.raised == second.raised
    # The data of the whole batch: all eight of them.
    whole = next(iter(data().train.batches(8, seed=0, epoch=0, drop_last=True))).index.tolist()
    assert first.raised is not None
    assert f"at step 0 on training data [{', '.join(map(str, whole))}]" in first.raised


def test_parameters_that_come_apart_are_told(tmp_path: Path) -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter += 1e-3 * torch.randn_like(parameter)

    def go() -> None:
        with pytest.raises(RuntimeError, match="parameters must be the same in all processes after a step"):
            fit(
                *linear(),
                data(),
                steps=3,
                batch_size=8,
                optimizer=Noisy,
                out=tmp_path / "run",
                progress=False,
            )

    results(run_together(go, tmp_path))


def test_others_end_when_one_is_killed(tmp_path: Path) -> None:
    step = Trainer.step

    def killed(self: Trainer, batch: Any) -> None:
        step(self, batch)
        if self.step_count == 5 and self.team.rank == 1:
            (tmp_path / "killed").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)

    def go() -> None:
        Trainer.step = killed  # type: ignore[method-assign]  # in this process, which ends with the test
        fit(*linear(), data(), steps=1000, batch_size=8, progress=False)

    first, second = run_together(go, tmp_path)
    assert second.exitcode == -signal.SIGKILL
    assert (first.kind, first.exitcode) == ("PeerFailure", 0)
    assert first.raised is not None
    assert "another process of the run is gone" in first.raised
    assert first.at - float((tmp_path / "killed").read_text()) < 10


def test_only_the_first_process_writes_measures_and_calls(tmp_path: Path) -> None:
    class Measures:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def measure(self, run: Any, row: Any) -> dict[str, float]:
            self.calls.append("measure")
            return {"own": float(os.getpid())}

        def finish(self, run: Any) -> None:
            self.calls.append("finish")

    def go() -> Any:
        monitor, called = Measures(), []
        run = fit(
            *linear(),
            data(),
            steps=4,
            batch_size=8,
            log_every=2,
            progress=False,
            out=tmp_path / "run",
            callbacks=[monitor, lambda run, row: called.append(row["step"])],
        )
        return monitor.calls, called, run.history

    first, second = results(run_together(go, tmp_path))
    assert first[:2] == (["measure", "measure", "finish"], [2, 4])
    assert second[:2] == ([], [])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert first[2] == second[2] == rows


def test_a_user_may_train_alone_in_each_process(tmp_path: Path) -> None:
    def go() -> Any:
        run = fit(
            *linear(), data(), steps=3, batch_size=9, seed=Team.find().rank, progress=False, distributed=False
        )
        return run.history[-1]["loss"]

    first, second = results(run_together(go, tmp_path))
    alone = [fit(*linear(), data(), steps=3, batch_size=9, seed=s, progress=False) for s in (0, 1)]
    assert [first, second] == [run.history[-1]["loss"] for run in alone]
    with pytest.raises(
        ValueError, match="distributed=True needs several processes: start them with torchrun"
    ):
        fit(*linear(), data(), steps=3, progress=False, distributed=True)


def test_a_process_alone_sends_nothing_and_has_the_plain_engine() -> None:
    team, tensor = Team(), torch.ones(2)
    assert team.alone
    assert team.leads
    assert isinstance(shared_engine("eager", ELBO(), *linear(), False, team), EagerEngine)
    assert team.mean(tensor) is tensor
    assert batch_mean(tensor) is tensor
    assert (team.tell("a"), team.all("a"), list(team.share([1, 2]))) == ("a", ["a"], [1, 2])
    with pytest.raises(ZeroDivisionError), team.together():
        raise ZeroDivisionError


def test_gradients_are_averaged_in_one_message_for_each_precision() -> None:
    seen = []

    def mean(tensor: Tensor) -> Tensor:
        seen.append((tensor.dtype, tensor.numel()))
        return 2 * tensor

    some = [torch.ones(3, 2).t(), torch.ones(4, dtype=torch.float64), torch.ones(5), torch.ones(1)]
    for tensor in some[:3]:
        tensor.grad = torch.arange(tensor.numel(), dtype=tensor.dtype).view_as(tensor)
    with sharing_batches(mean):
        batch_mean_gradients(some)
    assert seen == [(torch.float32, 11), (torch.float64, 4)]
    for tensor in some[:3]:
        assert tensor.grad is not None
        assert torch.equal(tensor.grad.flatten(), 2 * torch.arange(tensor.numel(), dtype=tensor.dtype))
    assert some[3].grad is None
    assert batch_mean(some[0]) is some[0]


def test_processes_find_the_bytes_of_one_estimate(tmp_path: Path) -> None:
    x = data().valid.x[:45]  # a block of 32, and an incomplete one

    def go(team: Team | None = None) -> Any:
        model, guide = linear()
        found = pvae.log_likelihood(model, guide, x, num_particles=40, seed=2, team=team, progress=False)
        return found.to_dict()

    alone = go()
    assert alone["num_data"] == 45
    for size in (2, 3):  # with three, one has nothing to do
        found = results(run_together(lambda: go(Team.find()), tmp_path, size=size))
        assert [json.dumps(one) for one in found] == [json.dumps(alone)] * size


def test_processes_find_the_bytes_of_one_nested_estimate(tmp_path: Path) -> None:
    x = diffused.data(40)

    def go(team: Team | None = None) -> Any:
        torch.manual_seed(0)
        model, guide = diffused.Model(), diffused.Guide()
        found = nested_likelihood(
            model, guide, x, num_particles=3, num_draws=2, num_times=4, team=team, progress=False
        )
        return found.to_dict()

    alone = go()
    found = results(run_together(lambda: go(Team.find()), tmp_path))
    assert [json.dumps(one) for one in found] == [json.dumps(alone)] * 2


def test_items_without_data_for_some_are_put_together_in_order(tmp_path: Path) -> None:
    def go() -> Any:
        team = Team.find()
        parts = [(torch.tensor([i]), torch.tensor([i * 0.5])) for i in team.share(range(5))]
        return [(int(a), float(b)) for a, b in team.collect(parts)], team.collect([])

    wanted: Any = ([(i, i * 0.5) for i in range(5)], [])
    assert results(run_together(go, tmp_path, size=3)) == [wanted] * 3


def test_a_lost_process_is_an_error_of_its_own() -> None:
    assert issubclass(PeerFailure, RuntimeError)
