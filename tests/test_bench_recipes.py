"""The floor of a recipe is the work of its networks, all of it and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_of_torch
from torch.utils.flop_counter import FlopCounterMode

from pvae.data import from_tensors
from pvae.experiments import SpecError, load_spec
from pvae.experiments.bench import format_table, recipes, run_bench
from pvae.experiments.bench.floor import Floor, Recorder
from pvae.experiments.bench.recipes import LIMITS, Recipe, drawn_data, time_recipe
from pvae.experiments.bench.run import _timers
from pvae.experiments.bench.training import _batches
from pvae.experiments.spec import recipes as all_recipes
from pvae.inference.trainer import Trainer
from pvae.nn import MLPEncoder

CPU = torch.device("cpu")
OF_FILES = [name for name in all_recipes() if load_spec(name).data.name in (*recipes._FILES, "celeba")]


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test here depends on which data sets are on this machine."""
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of one step and evaluations of a few data."""
    monkeypatch.setattr(
        recipes, "LIMITS", replace(LIMITS, max_steps=1, num_rows=600, num_data=4, num_particles=2)
    )


def _trainer(recipe: Recipe) -> Trainer:
    return Trainer(*recipe.pair(), total_steps=10, **recipe.settings())


# Beside networks there are products: by the factor of a covariance, in the mixture of a prior, with cosines.
@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("vae", 0.002),
        ("cvae-nf-digits", 0.0),
        ("iwae-mnist", 0.0),
        ("vampprior-mnist", 0.02),
        ("dvp-tiny", 0.01),
    ],
)
def test_the_floor_has_the_products_of_the_step_and_no_others(name: str, beside: float) -> None:
    recipe = Recipe(name, CPU)
    trainer = _trainer(recipe)
    batch = next(recipe.train.batches(4, seed=0, epoch=0, drop_last=True))
    with trainer.generator(), FlopCounterMode(display=False) as counter:
        trainer.step(batch)
    step, floor = counter.get_total_flops(), recipe.floor(4).flops()
    assert (1 - beside) * step <= floor <= step


def test_a_derivative_of_a_network_is_not_in_the_floor() -> None:
    recipe = Recipe("five-digits", CPU)
    trainer = _trainer(recipe)
    batch = next(recipe.train.batches(4, seed=0, epoch=0, drop_last=True))
    with trainer.generator(), FlopCounterMode(display=False) as counter:
        trainer.step(batch)
    assert 0.3 < recipe.floor(4).flops() / counter.get_total_flops() < 0.6


def test_a_floor_gives_every_network_a_gradient_and_changes_nothing() -> None:
    recipe = Recipe("vae", CPU)
    trainer = _trainer(recipe)
    batch = next(recipe.train.batches(4, seed=0, epoch=0, drop_last=True))
    with trainer.generator(), Recorder() as recorder:
        trainer.step(batch)
    before = [p.detach().clone() for p in trainer.parameters]
    floor = Floor(recorder.calls, trainer)
    for _ in range(2):
        floor.step()
    assert all(p.grad is not None and p.grad.any() for p in trainer.parameters)
    assert all(torch.equal(p, was) for p, was in zip(trainer.parameters, before, strict=True))
    stepped = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert stepped == {3}


class Stack(nn.Module):
    """No network by its name: what it calls is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU())
        self.table = nn.Embedding(5, 2)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h: Tensor = self.conv(x.contiguous(memory_format=torch.channels_last))
        with torch.no_grad():
            h = h + self.conv(x)
        return h.mean() + self.table(label).sum()


def test_recording_leaves_no_hook_behind() -> None:
    with Recorder():
        pass
    assert not module_of_torch._has_any_global_hook()


def test_what_is_recorded_is_run_again_as_it_was() -> None:
    stack, seen = Stack(), list[tuple[tuple[bool, ...], bool]]()
    x, label = torch.randn(4, 2, 3, 3, requires_grad=True), torch.tensor([1, 4])
    with Recorder() as recorder:
        stack(x, label)
    stack(x, label)
    assert [type(call.module) for call in recorder.calls] == [nn.Sequential, nn.Sequential, nn.Embedding]
    assert [call.gradient for call in recorder.calls] == [True, False, True]

    def note(module: nn.Module, args: Any) -> None:
        given: Tensor = args[0]
        if given.is_floating_point():
            last = given.is_contiguous(memory_format=torch.channels_last)
            seen.append(((last, given.requires_grad), torch.is_grad_enabled()))
        else:
            assert torch.equal(given, label)

    for module in (stack.conv, stack.table):
        module.register_forward_pre_hook(note)
    floor = Floor(recorder.calls)
    floor.step()
    # A leaf that requires a gradient does so under no_grad, too, where nobody asks.
    assert seen == [((True, True), True), ((False, False), False)]
    assert all(p.grad is not None for p in stack.parameters())
    seen.clear()
    floor.passes()
    assert [enabled for _, enabled in seen] == [False, False]


def test_a_call_under_a_transform_counts_as_the_call_it_is_of() -> None:
    encoder = MLPEncoder((6,), 2, (5,))
    x = torch.randn(3, 6)
    with Recorder() as recorder:
        torch.func.jvp(encoder.location, (x,), (torch.ones_like(x),))
    floor = Floor(recorder.calls)
    floor.step()
    assert [call.args[0].shape for call in recorder.calls] == [(3, 6)]
    assert floor.flops() == 2 * 2 * 3 * 6 * 5  # one product forward, one for the weights' gradient


def test_a_recipe_is_timed(little: None) -> None:
    rows = run_bench(device="cpu", rounds=2, names=("recipe:vae",), engines=None, threads=1, out=None)
    step, evaluation = rows
    assert [row["benchmark"] for row in rows] == ["recipe:vae"] * 2
    assert [step["ours"], evaluation["ours"]] == ["eager, step", "log_likelihood"]
    assert {row["yardstick"] for row in rows} == {"networks"}
    assert [step["size"], evaluation["size"]] == ["batch 64", "4 data, 2 particles"]
    assert [step["syncs"], evaluation["syncs"]] == [0, None]
    assert [step["note"], evaluation["note"]] == ["", ""]
    assert all(float(row["ratio"]) > 1 for row in rows)  # type: ignore[arg-type]
    table = format_table(rows).splitlines()
    assert len(table) == 3
    assert table[2].startswith("| vae ")
    json.dumps(rows)


@pytest.mark.parametrize("name", ["five-digits", "divae-synthetic", "dvp-tiny"])
def test_recipes_with_more_to_them_are_timed(name: str, little: None) -> None:
    rows = time_recipe(name, CPU, rounds=1, engines=("eager",))
    assert [row["syncs"] for row in rows] == [0, None]
    assert all(isinstance(row["ratio"], float) for row in rows)


def test_noise_stands_in_for_files(little: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Faces are large: the batch is halved until a step fits, and the row says so.
    monkeypatch.setattr(recipes, "LIMITS", replace(recipes.LIMITS, step=3e9, num_rows=40))
    step, evaluation = time_recipe("cvae-nf-celeba", CPU, rounds=1, engines=("eager",))
    assert step["size"] == "batch 5"
    assert step["note"] == "drawn data, batch 5, not 128"
    assert evaluation["ratio"] is not None


def test_a_batch_of_one_is_the_least(little: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "LIMITS", replace(recipes.LIMITS, step=1.0, evaluation=1.0))
    step, evaluation = time_recipe("vae", CPU, rounds=1, engines=("eager",))
    assert step["size"] == "batch 1"
    assert evaluation["ratio"] is None
    assert "left out: 2 particles for 4 data take over 6e+05 operations" in str(evaluation["note"])
    assert "evaluation left out: 2 particles" in format_table([step, evaluation])


def test_what_cannot_be_had_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(recipes._FILES, "mnist")
    (row,) = time_recipe("vae-mnist", CPU, rounds=1, engines=("eager",))
    assert row["ratio"] is None
    assert row["note"] == (
        "left out: the files of mnist are not there, and noise in place of them is not known"
    )
    assert "left out: the files of mnist" in format_table([row])


@pytest.mark.parametrize("name", OF_FILES)
def test_noise_has_the_shape_that_a_recipe_is_for(name: str) -> None:
    spec = load_spec(name)
    data = drawn_data(spec, 520)
    batch = next(data.train.batches(2, seed=0, epoch=0, drop_last=True))
    model, _ = spec.build(data)
    conditional = getattr(model, "conditional", False)
    assert data.protocol.values == ("binary" if spec.likelihood.kind == "bernoulli" else "unit")
    if conditional:
        assert batch.y is not None
        model.check_labels(batch.y)  # type: ignore[operator]


def test_every_recipe_is_asked_for_by_one_word() -> None:
    assert list(_timers(("recipes",))) == [f"recipe:{name}" for name in all_recipes()]
    assert list(_timers(("peers", "recipe:vae", "small"))) == ["peers", "recipe:vae", "small"]
    with pytest.raises(SpecError, match="there is no recipe 'vae-mnits': did you mean 'vae-mnist'"):
        _timers(("recipe:vae-mnits",))


def test_rounds_longer_than_an_epoch_go_on_with_the_next_one() -> None:
    recipe = Recipe("vae", CPU)
    split = from_tensors(torch.rand(6, 2)).train
    batches: Any = _batches(_trainer(recipe), split, 2, epoch=3)
    taken = [next(batches).index for _ in range(6)]
    for epoch in (taken[:3], taken[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(6))
    again: Callable[[int], list[Tensor]] = lambda e: [  # noqa: E731
        b.index for b in split.batches(2, seed=0, epoch=e, drop_last=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(taken, [*again(3), *again(4)], strict=True))
