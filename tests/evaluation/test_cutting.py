"""Draws of a guide in cuts of its particles: those of one run for all, from one look at the data."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.evaluation import DefensiveGuide
from pvae.evaluation.cutting import Cut, NotCuttable
from pvae.evaluation.weights import draw
from pvae.inference.isolation import evaluating
from tests.evaluation.products import Products
from tests.evaluation.test_annealing import networks
from tests.inference.programs import LinearGuide, LinearModel

pytestmark = pytest.mark.usefixtures("float64")

SIZE = 5


def in_cuts(guide: Any, x: Tensor, num_particles: int, rows: int, **given: Tensor) -> Any:
    with torch.no_grad():
        return draw(guide, x, None, num_particles, 3, given, rows)


def check_same(guide: Any, x: Tensor, num_particles: int, rows: int, **given: Tensor) -> None:
    whole, log_q = in_cuts(guide, x, num_particles, num_particles * len(x), **given)
    values, log_q_in_cuts = in_cuts(guide, x, num_particles, rows, **given)
    assert values.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(values[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_q_in_cuts, log_q, rtol=1e-12, atol=1e-11)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """No falling back to one run for all."""

    class Unknown(Exception):
        pass

    monkeypatch.setattr("pvae.evaluation.weights.NotCuttable", Unknown)


@pytest.mark.parametrize("rows", [1, 20, 61, 100])
@pytest.mark.parametrize("kind", ["normal", "flow", "five", "hvae", "ladder", "defensive"])
def test_draws_are_those_of_one_run_for_all(strict: None, kind: str, rows: int) -> None:
    model, guide, x = networks("hvae" if kind == "defensive" else kind)
    if kind == "defensive":
        rows = 20  # in others a number cannot be told from one for each particle
        model = LinearModel(ladder=True)
        guide, x = DefensiveGuide(model, LinearGuide(ladder=True)), torch.randn(4, 5)
    with evaluating(model, guide):
        check_same(guide, x, 23, rows)


def test_one_particle_at_a_time() -> None:
    """Where a number cannot be told from one for each particle, the guide runs for all."""
    model = LinearModel(ladder=True)
    check_same(DefensiveGuide(model, LinearGuide(ladder=True)), torch.randn(4, 5), 7, 4)


def test_latents_that_are_given_are_cut_as_well(strict: None) -> None:
    guide = LinearGuide(ladder=True)
    check_same(guide, torch.randn(4, 5), 23, 20, z_2=torch.randn(23, 4, 3))


def test_the_generator_is_left_as_by_one_run() -> None:
    guide, x = LinearGuide(ladder=True), torch.randn(4, 5)
    states = []
    for rows in (20, 1000):
        in_cuts(guide, x, 23, rows)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_encoder_runs_once_and_what_sees_particles_for_all_of_them() -> None:
    guide, x = LinearGuide(ladder=True), torch.randn(4, 5)
    with Products(*(m for m in guide.modules() if isinstance(m, nn.Linear))) as rows:
        in_cuts(guide, x, 24, 4 * 6)
    assert sorted(rows.counts) == [4, 4 * 24]


Noise = Callable[[Tensor], Tensor]


def guided(noise: Callable[[Tensor], Tensor]) -> Any:
    """A guide whose two latents have such noise around their places."""

    class Noisy(dist.Normal):
        def rsample(self, sample_shape: Any = ()) -> Tensor:
            return self.loc + noise(self.loc.expand(self.batch_shape))

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            return Noisy(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z_2", Noisy(x, torch.ones(len(x))))
            pyro.sample("z_1", Noisy(z.tanh(), torch.ones(len(x))))

    return guide


@pytest.mark.parametrize(
    "noise",
    [
        torch.randn_like,
        torch.rand_like,
        lambda z: torch.randn(z.shape),
        lambda z: torch.rand(z.shape),
        lambda z: torch.empty_like(z).exponential_(),
        lambda z: torch.empty(z.shape).uniform_(-1, 2),
        lambda z: torch.normal(z, z.square()),
        lambda z: torch.zeros_like(z).normal_(2.0, 3.0).add_(z),
        lambda z: torch.randn(z.shape[-1:]).expand(z.shape),  # one for all particles
        lambda z: torch.ones(z.shape[-1]).mul_(2).add_(1).sqrt_() * torch.randn_like(z),
    ],
)
def test_all_ways_to_draw(strict: None, noise: Noise) -> None:
    check_same(guided(noise), torch.randn(7), 23, 7 * SIZE)


@pytest.mark.parametrize(
    "noise",
    [
        torch.bernoulli,  # its stream hangs on the probabilities
        lambda z: torch.randn(z.numel()).reshape(z.shape),
        lambda z: torch.randn(z.shape[::-1]).T,
        lambda z: torch.empty(z.shape[::-1]).T.normal_(),
        lambda z: torch.randn(3, *z.shape).mean(0),
    ],
)
def test_what_cannot_be_told_apart_is_drawn_for_all_at_once(noise: Noise) -> None:
    def shares(z: Tensor) -> Tensor:
        return noise(z.sigmoid())

    guide, x = guided(shares), torch.randn(7)
    check_same(guide, x, 23, 7 * SIZE)
    cut = Cut(23, SIZE, 7)
    part = next(cut.parts())
    particles = pyro.plate("particles", SIZE, dim=-2)
    with torch.no_grad(), particles, pytest.raises(NotCuttable), cut.running(part, ()):
        guide(x)


def test_a_program_that_does_other_things_in_another_cut_is_run_for_all_at_once() -> None:
    calls = []

    def fickle(z: Tensor) -> Tensor:
        calls.append(len(z))
        return torch.randn_like(z) * (z.exp().exp() if len(calls) == 3 else z.exp())

    torch.manual_seed(0)
    values, _ = in_cuts(guided(fickle), torch.randn(7), 23, 7 * SIZE)
    assert calls == [SIZE, SIZE, SIZE, 23, 23]
    assert values["z_1"].shape == (23, 7)


@pytest.mark.parametrize("change", ["before", "between", "after"])
def test_what_is_changed_in_place_is_what_it_was(strict: None, change: str) -> None:
    """Features that are changed before, between and after what particles read of them."""

    def noise(z: Tensor) -> Tensor:
        features = (2 * torch.ones(7)).expand(z.shape).clone()
        if change == "before":
            features.sqrt_()
        found = features * torch.randn_like(z)
        if change == "between":
            features.mul_(2)
        elif change == "after":
            features.add_(z)
        return found * features

    check_same(guided(noise), torch.randn(7), 25, 7 * SIZE)
