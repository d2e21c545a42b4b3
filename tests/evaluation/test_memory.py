"""Evaluations within a budget of bytes: the same figures, one look at each datum, and no more memory."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pvae.evaluation import (
    annealed_likelihood,
    bidirectional,
    inference_gaps,
    log_likelihood,
    memory,
    nested_likelihood,
    simulation_based_calibration,
    to_arviz,
)
from pvae.evaluation.memory import Budget, Measured, default_memory
from pvae.guides import FiveGuide, FlowGuide, LadderGuide, NormalGuide, laplace_proposal
from pvae.likelihoods import Normal
from pvae.models import VAE, Ladder
from pvae.nn import LadderSpec, MLPDecoder, MLPDenoiser, MLPEncoder
from pvae.priors import DiffusionPrior, StandardNormal
from tests.evaluation.products import Products
from tests.ladders import jolted, ladder

MIB = 2**20


class Live(TorchDispatchMode):
    """Most bytes at one time of all that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and id(value.untyped_storage()) not in self._seen:
                held = value.untyped_storage()
                self._seen[id(held)] = weakref.ref(held, self._gone(id(held), held.nbytes()))
                self.bytes += held.nbytes()
                self.most = max(self.most, self.bytes)
        return out

    def _gone(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self.bytes -= size
            del self._seen[key]

        return gone


def ladders(kind: str) -> tuple[Ladder, LadderGuide, Tensor]:
    """A ladder with an exact density, or under a diffusion, whose density is estimated."""
    torch.manual_seed(1)
    spec = LadderSpec((1, 16, 16), scales=((8, 1), (4, 1)), channels=8)
    prior = DiffusionPrior(MLPDenoiser((1, 2, 2), hidden=8), (1, 2, 2), num_steps=5)
    u = {"plain": None, "normal": 2, "diffusion": 2}[kind]
    model, guide = ladder(spec, u=u, prior=prior if kind == "diffusion" else None)
    jolted(model, guide, size=0.1)
    return model, guide, (torch.rand(33, 1, 16, 16) < 0.5).float()


@pytest.mark.parametrize("kind", ["plain", "normal", "diffusion"])
def test_a_ladder_keeps_within_its_budget_and_figures_stay(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, guide, x = ladders(kind)
    found, most = [], []
    for limit in (2**40, 24 * MIB):
        # Nothing but the budget is to cut passes.
        monkeypatch.setattr(memory, "_CACHED", 2**40)
        with Live() as live:
            found.append(log_likelihood(model, guide, x, num_particles=80, memory=limit))
        most.append(live.most)
    assert most[1] < 24 * MIB < most[0] / 3
    one, other = found
    torch.testing.assert_close(other.log_prob, one.log_prob, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(other.pareto_k, one.pareto_k, rtol=1e-3, atol=1e-3)


def test_without_a_word_passes_are_those_that_a_cpu_is_fastest_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, x = ladders("normal")
    with Live() as live:
        usual = log_likelihood(model, guide, x[:32], num_particles=80)
    monkeypatch.setattr(memory, "_CACHED", MIB)
    monkeypatch.setattr(memory, "_LARGEST", MIB)
    with Live() as less:
        cut = log_likelihood(model, guide, x[:32], num_particles=80)
    assert less.most < live.most / 2
    torch.testing.assert_close(cut.log_prob, usual.log_prob, rtol=1e-5, atol=1e-4)


def test_nested_and_arviz_take_part(float64: None) -> None:
    model, guide, x = ladders("diffusion")
    model, guide, x = model.double(), guide.double(), x[:5].double()
    settings: dict[str, Any] = {"num_particles": 30, "num_draws": 2, "num_times": 4}
    one, other = (nested_likelihood(model, guide, x, memory=limit, **settings) for limit in (2**40, 2**20))
    torch.testing.assert_close(other.log_prob, one.log_prob)
    torch.testing.assert_close(other.draw_error, one.draw_error)
    exact = log_likelihood(model, guide, x, num_particles=60, memory=2**20)
    tree = to_arviz(model, guide, x, num_draws=60, num_particles=1)
    certified = torch.from_numpy(tree["sample_stats"]["log_p_x"].values)
    torch.testing.assert_close(certified, exact.log_prob)


@pytest.mark.parametrize("kind", ["plain", "normal"])
def test_chains_are_cut_and_end_where_they_did(float64: None, kind: str) -> None:
    model, guide, x = ladders(kind)
    model, guide, x = model.double(), guide.double(), x[:4].double()
    found, most = [], []
    for limit in (2**40, 16 * MIB):
        with Live() as live:
            settings: dict[str, Any] = {"num_steps": 2, "num_leapfrog": 1, "num_chains": 64}
            found.append(annealed_likelihood(model, guide, x, memory=limit, **settings))
        most.append(live.most)
    assert most[1] < 16 * MIB < most[0] / 3
    torch.testing.assert_close(found[1].log_prob, found[0].log_prob)
    torch.testing.assert_close(found[1].acceptance, found[0].acceptance)


def small(kind: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model, a guide, and the first layer that x meets."""
    torch.manual_seed(1)
    if kind == "ladder":
        spec = LadderSpec((1, 8, 8), scales=((4, 1), (2, 1)), channels=4)
        model, guide = ladder(spec, u=None)
        jolted(model, guide, size=0.1)
        return model, guide, guide.bottom_up.stem
    encoder = MLPEncoder((5,), 2, hidden=(8,), activation="tanh")
    first = next(m for m in encoder.modules() if isinstance(m, nn.Linear))
    net, likelihood = MLPDecoder(2, (5,), hidden=(8,), activation="tanh"), Normal(value=0.7)
    vae = VAE(StandardNormal(2), net, likelihood)
    if kind == "normal":
        return vae, NormalGuide(encoder), first
    if kind == "flow":
        return vae, FlowGuide(encoder), first
    if kind == "five":
        return vae, FiveGuide(encoder, net, likelihood), first
    return vae, laplace_proposal(vae, NormalGuide(encoder)), first


def data(kind: str, num: int) -> Tensor:
    return (torch.rand(num, 1, 8, 8) < 0.5).float() if kind == "ladder" else torch.rand(num, 5)


KINDS = ["normal", "flow", "five", "laplace", "ladder"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_sees_each_datum_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, first = small(kind)
    # Many passes, of a few particles each.
    monkeypatch.setattr(memory, "_CACHED", 2**16)
    monkeypatch.setattr(memory, "_LARGEST", 2**16)
    with Products(first) as rows:
        log_likelihood(model, guide, data(kind, 64), num_particles=60)
    assert rows[0] == 64 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_and_so_it_does_in_all_that_draws_from_a_guide(kind: str) -> None:
    model, guide, first = small(kind)
    num = 20

    def annealing() -> None:  # of `annealed_likelihood` too
        bidirectional(model, guide, data(kind, num), num_chains=16, num_steps=40)

    def gaps() -> None:
        inference_gaps(model, guide, data(kind, num), num_steps=3, num_particles=64)

    def calibration() -> None:
        simulation_based_calibration(model, guide, data(kind, num), num_simulations=num, num_draws=15)

    counts = {}
    for run in (annealing, gaps, calibration):
        with Products(first) as rows:
            run()
        counts[run.__name__] = rows[0] / num
    # A few looks at each datum, at the door, for starts and densities, and to record these, as blocks are
    # padded to 32 data: it is none for each of hundreds of evaluations, of 16 chains or 64 particles.
    assert {name: count for name, count in counts.items() if count > 15} == {}


def test_a_budget_holds_what_is_there_beside_it() -> None:
    cpu = torch.device("cpu")
    assert default_memory(cpu) == 2**30
    assert Budget(100 * MIB, cpu).rows(MIB) == 50  # as much again for what is no tensor
    assert Budget(100 * MIB, cpu).rows(MIB, held=60 * MIB) == 20
    assert Budget(100 * MIB, cpu).rows(MIB, held=200 * MIB) == 1
    # Where there is room, passes are those that a CPU is fastest at.
    assert Budget(2**40, cpu).rows(2**10) == 2**13
    assert Budget(2**40, cpu).rows(2**15) == 512
    assert Budget(2**40, cpu).rows(MIB) == 64
    assert Budget(2**40, cpu).rows(MIB, quick=False) == 2**19
    assert Budget(2**40, torch.device("cuda")).rows(MIB) == 2**19


def test_what_is_measured_is_what_grows_with_particles() -> None:
    weight = torch.randn(100, 1000)
    with Measured() as found:
        features = weight.sum(0).exp()  # 2 times 4000 bytes, kept for all particles
        z = torch.randn(10)  # 40 bytes
        for _ in range(3):
            wide = features * z.sum()  # 4000 bytes each time, at most twice at a time
            del wide
        z = z + features[:10].clone()
    assert found.kept == 2 * 4000 + 40
    assert 4000 <= found.peak <= 4000 + 40 + 40 + 8


@pytest.mark.parametrize("evaluate", [log_likelihood, nested_likelihood, annealed_likelihood, bidirectional])
def test_a_budget_must_be_positive(evaluate: Any) -> None:
    model, guide, x = ladders("diffusion" if evaluate is nested_likelihood else "normal")
    with pytest.raises(ValueError, match="memory must be a positive number of bytes, got 0"):
        evaluate(model, guide, x[:2], memory=0)
