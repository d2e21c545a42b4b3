"""Threads: what a measurement finds on a clock of our own, what it leaves alone, and who may overrule it."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae.inference import threads
from pvae.inference.threads import Threads, available_threads, choose_threads, measure_threads, threads_set

from .profiled import profiled_programs
from .programs import LinearGuide, LinearModel, parameters


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with threads_set(None):
        yield


class Machine:
    """A clock that each step moves by what the table says for the number of threads at that moment."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds, self.now, self.steps = seconds, 0.0, 0

    def __call__(self) -> float:
        return self.now

    def step(self, *_: Any) -> None:
        self.steps += 1
        self.now += self.seconds[torch.get_num_threads()]


def measured(seconds: dict[int, float], **options: Any) -> tuple[Threads, Machine]:
    machine = Machine(seconds)
    model, guide = LinearModel(), LinearGuide()
    guide.register_forward_pre_hook(machine.step)
    settings: dict[str, Any] = {"limit": max(seconds), "clock": machine} | options
    return measure_threads(model, guide, (torch.randn(7, 5),), **settings), machine


@pytest.mark.parametrize(
    ("seconds", "number"),
    [
        ({1: 0.01, 2: 0.02, 4: 0.1}, 1),
        ({1: 0.1, 2: 0.05, 4: 0.03}, 4),
        ({1: 0.1, 2: 0.05, 4: 0.2}, 2),
        ({1: 0.1, 2: 0.095}, 1),  # not worth a thread
        ({1: 0.1, 2: 0.05, 4: 0.048}, 2),
        ({1: 0.1, 2: 0.06, 3: 0.04}, 3),  # three cores: 1, 2, 3
        ({1: 0.1, 2: 0.08, 4: 0.06, 6: 0.03}, 6),
        ({1: 0.001}, 1),
    ],
)
def test_the_fewest_threads_near_the_fastest_win(seconds: dict[int, float], number: int) -> None:
    found, _ = measured(seconds)
    assert found.number == number
    assert found.seconds == (pytest.approx(seconds) if len(seconds) > 1 else {})


def test_a_sentence_says_what_was_measured() -> None:
    assert str(measured({1: 0.015, 2: 0.02})[0]) == ("1 (measured: a step takes 15.0 ms on 1, 20.0 ms on 2)")
    assert str(measured({1: 0.1})[0]) == "1 (there is one core)"
    assert str(measured({1: 2.5, 2: 9.0})[0]) == "2 (a step takes 2.5 s on one thread)"


def test_a_margin_may_be_asked_for() -> None:
    assert measured({1: 0.1, 2: 0.095}, margin=0.01)[0].number == 2
    assert measured({1: 0.1, 2: 0.06}, margin=1.0)[0].number == 1


def test_a_slow_step_is_not_tried_and_gets_all() -> None:
    found, machine = measured({1: 3.0, 2: 60.0, 4: 60.0})
    assert found.number == 4
    assert machine.steps == 2


@pytest.mark.parametrize("once", [0.003, 0.02, 0.2, 0.9])
def test_a_measurement_stays_near_its_budget(once: float) -> None:
    _, machine = measured({1: once, 2: once, 4: once})
    assert machine.now <= 1.0 + 4 * max(once, 0.02)


def test_the_least_of_several_rounds_counts() -> None:
    """A neighbour on the machine makes every other round of two threads slow."""

    class Disturbed(Machine):
        def step(self, *_: Any) -> None:
            super().step()
            if torch.get_num_threads() == 2 and self.steps % 6 < 3:
                self.now += 1e-1

    machine = Disturbed({1: 0.01, 2: 0.005})
    model, guide = LinearModel(), LinearGuide()
    guide.register_forward_pre_hook(machine.step)
    found = measure_threads(model, guide, (torch.randn(7, 5),), limit=2, clock=machine, budget=5.0)
    assert found.number == 2


def test_a_measurement_leaves_everything_as_it_was() -> None:
    model, guide = profiled_programs()
    x = torch.randn(7, 5)
    for parameter in parameters(model, guide)[:2]:
        parameter.grad = torch.ones_like(parameter)

    def state() -> list[Any]:
        kept = [*parameters(model, guide), *model.buffers(), *guide.buffers(), x]
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters(model, guide)]
        return [[t.detach().clone() for t in kept], gradients, torch.get_rng_state()]

    torch.set_num_threads(3)
    before = state()
    measure_threads(model, guide, (x,), limit=2, budget=0.01)
    after = state()
    assert torch.get_num_threads() == 3
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_failing_program_leaves_the_number_of_threads() -> None:
    class Failing(LinearModel):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            raise ValueError("no")

    torch.set_num_threads(3)
    with pytest.raises(ValueError, match="no"):
        measure_threads(Failing(), LinearGuide(), (torch.randn(7, 5),), limit=2)
    assert torch.get_num_threads() == 3


def test_beside_a_gpu_nothing_is_measured() -> None:
    on_meta = LinearModel().to("meta"), LinearGuide().to("meta")
    found = measure_threads(*on_meta, (torch.zeros(7, 5, device="meta"),), limit=2)
    assert found == Threads(torch.get_num_threads(), "as torch has it beside a GPU")


def test_the_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert available_threads() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert available_threads() == 8
    assert threads._powers(1) == [1]
    assert threads._powers(8) == [1, 2, 4, 8]
    assert threads._powers(12) == [1, 2, 4, 8, 12]


FOUND = Threads(4, "measured")


@pytest.mark.parametrize(
    ("asked", "before", "environment", "number"),
    [
        (None, None, {}, 4),
        (3, None, {}, 3),
        (3, None, {"OMP_NUM_THREADS": "2"}, 3),
        (None, None, {"OMP_NUM_THREADS": "2"}, 2),
        (None, None, {"OMP_NUM_THREADS": ""}, 4),
        (None, 5, {}, 5),
        (None, 5, {"OMP_NUM_THREADS": "2"}, 5),
        (5, 5, {}, 5),
    ],
)
def test_a_number_that_is_given_holds(
    asked: int | None, before: int | None, environment: dict[str, str], number: int
) -> None:
    torch.set_num_threads(2)  # as torch does at its start, where the environment says so
    measured = []
    found = choose_threads(
        lambda: measured.append(1) or FOUND,  # type: ignore[func-returns-value]
        asked=asked,
        before=before,
        environment=environment,
    )
    assert found.number == number
    assert bool(measured) == (number == 4)


def test_a_resumed_run_keeps_its_number() -> None:
    with pytest.raises(ValueError, match="threads must be 2, as in the run that is resumed, got 1"):
        choose_threads(lambda: FOUND, asked=1, before=2)


def test_a_number_is_positive() -> None:
    with pytest.raises(ValueError, match="threads must be positive, got 0"):
        choose_threads(lambda: FOUND, asked=0)
    with pytest.raises(ValueError, match="threads must be positive, got 0"):
        pvae.fit(LinearModel(), LinearGuide(), torch.randn(20, 5), steps=1, batch_size=4, threads=0)


def test_fit_uses_a_number_of_threads_and_gives_the_old_one_back() -> None:
    seen = []
    model, guide = LinearModel(), LinearGuide()
    guide.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    pvae.fit(model, guide, torch.randn(20, 5), steps=1, batch_size=4, threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
