"""The nested bound against normals of which every term is known, and on a ladder against its neighbours."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch import Tensor, nn

from pvae.data import from_tensors
from pvae.distributions import Diffusion
from pvae.evaluation import NestedEstimate, log_likelihood, nested, nested_likelihood
from pvae.evaluation.blocks import PASS_ROWS
from pvae.evaluation.weights import log_weights
from pvae.inference import ELBO
from pvae.models import Ladder
from pvae.nn import LadderSpec, MLPDenoiser
from pvae.priors import DiffusionPrior

from ..ladders import jolted, ladder

pytestmark = pytest.mark.usefixtures("float64")

SIZE = 3
LOC, VARIANCE = 0.1, 0.05  # of u
GAMMA = (-6.0, 7.0)
SLOPE, SHIFT, SPREAD = 1.5, -0.2, 0.3  # z | u ~ N(SLOPE u + SHIFT, SPREAD^2)
GAIN, NOISE = 2.0, 0.5  # x | z ~ N(GAIN z, NOISE^2)

# Given u, x is normal, and given u and x so is z.
X_SCALE = math.hypot(GAIN * SPREAD, NOISE)
Z_SCALE = 1 / math.sqrt(1 / SPREAD**2 + GAIN**2 / NOISE**2)
# u given x.
X_VARIANCE = (GAIN * SLOPE) ** 2 * VARIANCE + X_SCALE**2
U_SCALE = math.sqrt(VARIANCE * X_SCALE**2 / X_VARIANCE)
# The bound of u that spec and closed form give, below its entropy, for each coefficient of u.
CONTINUOUS_GAP = 0.0242


class Optimal(nn.Module):
    """The noise that the posterior mean of u ~ N(LOC, VARIANCE) implies."""

    def forward(self, y: Tensor, gamma: Tensor) -> Tensor:
        signal, noise = torch.sigmoid(-gamma).unsqueeze(-1), torch.sigmoid(gamma).unsqueeze(-1)
        precision = 1 / VARIANCE + signal / noise
        u = (LOC / VARIANCE + signal.sqrt() * y / noise) / precision
        return (y - signal.sqrt() * u) / noise.sqrt()


class Model(nn.Module):
    """w under a diffusion, z and x normal, entry by entry; under labels, x is moved by them."""

    def __init__(self, last: bool = False, conditional: bool = False) -> None:
        super().__init__()
        self.prior = DiffusionPrior(Optimal(), (SIZE,), *GAMMA, prediction="eps", num_steps=100)
        self.gain = nn.Parameter(torch.tensor(GAIN))
        self.last, self.conditional = last, conditional
        self.modes: set[bool] = set()

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        self.modes.add(self.training)
        with pyro.plate("data", len(x), dim=-1):
            if self.last:
                z = pyro.sample("z", dist.Normal(x.new_zeros(SIZE), 1.0).to_event(1))
                u = pyro.sample("w", self.prior())
            else:
                u = pyro.sample("w", self.prior())
                z = pyro.sample("z", dist.Normal(SLOPE * u + SHIFT, SPREAD).to_event(1))
            moved = 0.0 if y is None else y.to(x).unsqueeze(-1)
            pyro.sample("x", dist.Normal(self.gain * z + moved, NOISE).to_event(1), obs=x)


class Guide(nn.Module):
    """The exact posterior, or one off it: u wider by a factor, z wider and moved."""

    def __init__(self, u_factor: float = 1.0, z_factor: float = 1.0, z_move: float = 0.0) -> None:
        super().__init__()
        self.u_factor, self.z_factor, self.z_move = u_factor, z_factor, z_move
        self.last = False

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        x = x if y is None else x - y.to(x).unsqueeze(-1)
        with pyro.plate("data", len(x), dim=-1):
            if self.last:
                pyro.sample("z", dist.Normal(0.2 * x, 1.0).to_event(1))
            u = pyro.sample("w", dist.Normal(u_mean(x), self.u_factor * U_SCALE).to_event(1))
            if not self.last:
                loc = Z_SCALE**2 * ((SLOPE * u + SHIFT) / SPREAD**2 + GAIN * x / NOISE**2) + self.z_move
                pyro.sample("z", dist.Normal(loc, self.z_factor * Z_SCALE).to_event(1))


def u_mean(x: Any) -> Any:
    rest = x - GAIN * (SLOPE * LOC + SHIFT)
    return LOC + GAIN * SLOPE * VARIANCE / X_VARIANCE * rest


def data(n: int, seed: int = 1) -> Tensor:
    """Draws from the model."""
    noise = torch.randn(n, SIZE, generator=torch.Generator().manual_seed(seed))
    return GAIN * (SLOPE * LOC + SHIFT) + math.sqrt(X_VARIANCE) * noise


def log_marginal(x: Tensor) -> Tensor:
    loc = GAIN * (SLOPE * LOC + SHIFT)
    return torch.from_numpy(stats.norm.logpdf(x.numpy(), loc, math.sqrt(X_VARIANCE)).sum(-1))


def bound_of_u(u: Any) -> Any:
    """Mean of the diffusion's bound at u, one entry at a time."""

    def moments(gamma: float) -> tuple[float, float]:
        ratio = math.exp(-gamma)
        posterior = 1 / (1 / VARIANCE + ratio)
        return ratio * posterior**2 / VARIANCE**2, ratio**2 * posterior**2

    square, constant = (quad(lambda g, i=i: moments(g)[i], *GAMMA)[0] for i in (0, 1))
    alpha, sigma = 1 / (1 + math.exp(GAMMA[1])), 1 / (1 + math.exp(-GAMMA[1]))
    last = 0.5 * (alpha * u**2 + sigma - math.log(sigma) - 1)
    first = 0.5 * (math.log(2 * math.pi) + GAMMA[0] + 1)
    return -(first + 0.5 * (square * (u - LOC) ** 2 + constant) + last)


def expected(x: Tensor, u_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Nested bound under the exact posterior of z, and the rate of u, each datum."""
    scale = u_factor * U_SCALE
    # Quadratic in u: the mean over a normal is that over two points.
    points = [u_mean(x.numpy()) + sign * scale for sign in (-1, 1)]
    rate = -stats.norm.entropy(0, scale) - np.mean([bound_of_u(u) for u in points], 0)
    loc = [GAIN * (SLOPE * u + SHIFT) for u in points]
    inner = np.mean([stats.norm.logpdf(x.numpy(), m, X_SCALE) for m in loc], 0)
    return torch.from_numpy((inner - rate).sum(-1)), torch.from_numpy(rate.sum(-1))


def assert_mean(differences: Tensor, number: float = 4.0) -> None:
    """Mean zero within some standard errors over data, which include all noise."""
    assert differences.mean().abs() < number * differences.std() / math.sqrt(len(differences))


@pytest.mark.parametrize("u_factor", [1.0, 1.6])
def test_under_the_exact_posterior_of_z_every_term_is_known(u_factor: float) -> None:
    model, guide, x = Model(), Guide(u_factor), data(150)
    found = nested_likelihood(model, guide, x, num_particles=3, num_draws=40, num_times=4)
    exact, rate = expected(x, u_factor)
    assert_mean(found.log_prob - exact)
    assert_mean(found.rate_values - rate)
    # The inner weights have no variance: K plays no part.
    torch.testing.assert_close(found.elbo_values, found.log_prob)
    # The error of each datum is what its estimate is off by.
    score = (found.log_prob - exact) / found.draw_error
    assert score.std().item() == pytest.approx(1, abs=0.2)
    assert found.outer == ("w",)


def test_the_gap_to_the_marginal_likelihood_is_that_of_the_diffusion() -> None:
    x = data(2000)
    found = nested_likelihood(Model(), Guide(), x, num_particles=1, num_draws=16)
    gap = log_marginal(x) - found.log_prob
    assert_mean(gap - SIZE * CONTINUOUS_GAP)
    assert 4 * gap.std() / math.sqrt(len(x)) < SIZE * CONTINUOUS_GAP
    # A wider r(u | x) is paid for by its divergence from the posterior of u, whatever K is.
    wide = nested_likelihood(Model(), Guide(2.0), x, num_particles=50, num_draws=2)
    divergence = SIZE * (0.5 * (4 - 1) - math.log(2))
    lacking = (4 - 1) * U_SCALE**2 * (log_curvature() - 1 / VARIANCE) / 2 * SIZE
    assert wide.mean == pytest.approx(found.mean - divergence - lacking, abs=0.1)


def log_curvature() -> float:
    """Minus the second derivative of the diffusion's bound at any u."""
    h = 0.1
    return float(-(bound_of_u(h) - 2 * bound_of_u(0.0) + bound_of_u(-h)) / h**2)


def test_one_particle_is_the_elbo_and_many_reach_the_exact_inner_likelihood() -> None:
    model, guide, x = Model(), Guide(1.2, 1.4, 0.05), data(200)
    ceiling, _ = expected(x, 1.2)
    divergence = SIZE * (0.5 * (1.4**2 - 1 + (0.05 / Z_SCALE) ** 2) - math.log(1.4))
    one = nested_likelihood(model, guide, x, num_particles=1, num_draws=16)
    torch.testing.assert_close(one.elbo_values, one.log_prob)
    assert_mean(one.log_prob - (ceiling - divergence))
    many = nested_likelihood(model, guide, x, num_particles=200, num_draws=16)
    assert_mean(many.elbo_values - (ceiling - divergence))
    # The same u and times under the exact q(z | u, x): what is left is the variance of the weights over 2 K.
    exact = nested_likelihood(model, Guide(1.2), x, num_particles=1, num_draws=16)
    torch.testing.assert_close(exact.rate_values, many.rate_values)
    lacking = (many.log_prob - exact.log_prob).mean().item()
    assert lacking == pytest.approx(-0.002, abs=0.005)
    assert (one.log_prob - exact.log_prob).mean().item() == pytest.approx(-divergence, abs=0.1)
    assert one.kl["z"] == pytest.approx(many.kl["z"], abs=0.2)
    assert list(one.kl) == ["w", "z"]


def pool(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Keep every table of inner log-weights that is computed."""
    kept: list[Tensor] = []

    def keeping(*arguments: Any, **keywords: Any) -> Tensor:
        kept.append(log_weights(*arguments, **keywords))
        return kept[-1]

    monkeypatch.setattr(nested, "log_weights", keeping)
    return kept


def test_it_is_the_log_mean_of_inner_weights_that_share_u_and_rises_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = pool(monkeypatch)
    draws, k = 2, 64
    for model, guide, x in (
        (Model(), Guide(1.2, 1.4, 0.05), data(32)),
        (*diffusing(), binary(32)),
    ):
        kept.clear()
        found = nested_likelihood(model, guide, x, num_particles=k, num_draws=draws)
        # The first table is that of the check at the door.
        log_w = torch.cat([table for table in kept if table.shape[1] == 32]).reshape(draws, k, 32)
        parts = [log_w.unflatten(1, (-1, size)).logsumexp(2) - math.log(size) for size in (1, 2, 8, 64)]
        whole = parts[-1].squeeze(1).mean(0) - found.rate_values
        torch.testing.assert_close(found.log_prob, whole)
        torch.testing.assert_close(found.elbo_values, parts[0].mean((0, 1)) - found.rate_values)
        for fewer, more in itertools.pairwise(parts):
            rise = (more.mean(1) - fewer.mean(1)).mean(0)
            assert rise.mean() > 3 * rise.std() / math.sqrt(32)


SPEC = LadderSpec((1, 4, 4), ((2, 1), (1, 2)), channels=3)


def binary(n: int) -> Tensor:
    return (torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5).double()


def diffusing(num_steps: int = 40) -> tuple[Ladder, Any]:
    """A ladder at random under a diffusion prior."""
    torch.manual_seed(0)
    prior = DiffusionPrior(MLPDenoiser((1, 2, 2), 8, 1), (1, 2, 2), gamma_min=-6.0, num_steps=num_steps)
    model, guide = ladder(SPEC, u=2, prior=prior)
    jolted(model, guide, size=0.2)
    return model, guide


def test_on_a_ladder_elbo_nested_and_full_stand_in_order() -> None:
    model, guide = diffusing()
    x = binary(64)
    assert isinstance(model.prior, DiffusionPrior)
    with torch.no_grad():
        model.prior.calibrate(guide.posterior_u(binary(64)).sample((20,)) for _ in range(10))
    inner = nested_likelihood(model, guide, x, num_particles=100, num_draws=8)
    full = log_likelihood(model, guide, x, num_particles=400)
    for low, high in ((inner.elbo_values, inner.log_prob), (inner.log_prob, full.log_prob)):
        rise = high - low
        assert rise.mean() > -3 * rise.std() / math.sqrt(len(x))
    assert inner.mean - inner.elbo > 0.2
    assert full.mean - inner.mean > 0.2
    assert (full.num_steps, full.calibrated) == (40, True)


def test_kl_and_elbo_are_those_of_the_objective() -> None:
    model, guide = diffusing()
    x = binary(40)
    found = nested_likelihood(model, guide, x, num_particles=20, num_draws=40)
    assert model.training
    with torch.no_grad():
        terms = ELBO("mean_field", 300).terms(model, guide, x)
    assert found.elbo == pytest.approx(-terms.loss.item(), abs=0.3)
    for name in ("u", "z_3", "z_2", "z_1"):
        assert found.kl[name] == pytest.approx(terms.parts[f"kl/{name}"].item(), abs=0.25), name
    assert found.rate == pytest.approx(found.kl["u"])
    assert found.rate == pytest.approx(found.rate_values.mean().item())


@pytest.mark.parametrize("programs", ["normal", "ladder"])
def test_figures_depend_neither_on_the_batch_nor_on_the_other_data(programs: str) -> None:
    model, guide = diffusing(4) if programs == "ladder" else (Model(), Guide(1.2, 1.4))
    x = binary(70) if programs == "ladder" else data(70)
    settings: dict[str, Any] = {"num_particles": 5, "num_draws": 3, "num_times": 2, "seed": 3}
    whole = nested_likelihood(model, guide, x, **settings)
    for other in (
        nested_likelihood(model, guide, x, **settings, batch_size=1),
        nested_likelihood(model, guide, x, **settings, batch_size=64),
        nested_likelihood(model, guide, x, **settings, batch_size=1000),
        nested_likelihood(model, guide, x[:33], **settings),
    ):
        n = len(other.log_prob)
        for name in ("log_prob", "elbo_values", "draw_error", "rate_values"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name)[:n], rtol=0, atol=1e-10)
    # Blocks do not share their noise: the same data in another one.
    twice = torch.cat([x[:32], x[:32]])
    repeated = nested_likelihood(model, guide, twice, **settings).log_prob.split(32)
    assert (repeated[0] != repeated[1]).all()
    assert nested_likelihood(model, guide, x, **(settings | {"seed": 4})).elbo != whole.elbo


def test_a_pass_holds_few_rows_and_chunks_change_no_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASS_ROWS, "cpu", 96)
    kept = pool(monkeypatch)
    model, guide, x = Model(), Guide(1.2, 1.4, 0.05), data(64)
    chunked = nested_likelihood(model, guide, x, num_particles=7, num_draws=5)
    assert {len(table) for table in kept[1:]} == {3, 2}  # 35 particles, three times 32 rows at once
    assert sum(table.numel() for table in kept[1:]) == 35 * 64
    monkeypatch.undo()
    assert_mean(chunked.log_prob - nested_likelihood(model, guide, x, num_particles=7, num_draws=5).log_prob)


def test_an_unbiased_density_that_is_no_module_of_ours_goes_in_as_it_is() -> None:
    schedule = torch.tensor(GAMMA[0]), torch.tensor(GAMMA[1])

    class Own(Model):
        def __init__(self, num_steps: int) -> None:
            super().__init__()
            own = Diffusion(Optimal(), schedule, (SIZE,), "chain", num_steps, prediction="eps")
            del self.prior
            self.prior = lambda: own  # type: ignore[assignment]

    x = data(200)
    exact, _ = expected(x)
    few, many = (nested_likelihood(Own(steps), Guide(), x, num_particles=1) for steps in (25, 400))
    # Table of the paper's notes for a variance of .05: T = 25 costs .338 of a nat for each entry.
    assert few.mean == pytest.approx(exact.mean().item() + SIZE * (CONTINUOUS_GAP - 0.3380), abs=0.1)
    assert few.mean < many.mean
    assert many.mean == pytest.approx(exact.mean().item(), abs=0.1)


def test_labels_are_handed_on() -> None:
    y = torch.arange(200) % 2
    x = data(200) + y.unsqueeze(-1)
    found = nested_likelihood(Model(conditional=True), Guide(), x, y, num_particles=2, num_draws=8)
    exact, _ = expected(x - y.unsqueeze(-1))
    assert_mean(found.log_prob - exact)
    assert str(found).startswith("nested bound: log p(x | y) >= ")
    split = from_tensors(x, y=y, name="pairs").train
    assert nested_likelihood(Model(conditional=True), Guide(), split, num_particles=1).conditional
    assert not nested_likelihood(Model(), Guide(), split, num_particles=1).conditional


def test_it_leaves_the_programs_and_generators() -> None:
    model, guide = Model().train(), Guide().eval()
    model.prior.estimator = "chain"
    state, before = torch.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    first = nested_likelihood(model, guide, data(9), num_particles=2)
    assert model.modes == {False}
    assert model.training
    assert not guide.training
    assert model.prior.estimator == "chain"
    assert model.prior.num_times == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not pyro.get_param_store().keys()
    torch.randn(3)
    assert nested_likelihood(model, guide, data(9), num_particles=2).to_dict() == first.to_dict()


def test_it_prints_one_line_and_goes_into_json() -> None:
    split = from_tensors(data(40), name="points").train
    found = nested_likelihood(Model(), Guide(), split, num_particles=5, num_draws=3, num_times=2)
    line = str(found)
    assert "\n" not in line
    assert line.startswith(
        f"nested bound: log p(x) >= {found.mean:.2f} ± {found.standard_error:.2f} nats (IWAE-5 "
    )
    assert (
        f"3 draws of w, continuous time, on 40 data, Monte-Carlo error {found.monte_carlo_error:.3f}" in line
    )
    assert f"ELBO {found.elbo:.2f}, rate of w {found.rate:.2f}); protocol points " in line
    row = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (row["bound"], row["num_particles"], row["num_draws"], row["num_times"]) == ("nested", 5, 3, 2)
    assert row["log_likelihood"] == found.mean
    assert row["kl"] == found.kl
    assert row["per_datum"]["rate"] == found.rate_values.tolist()
    assert found.monte_carlo_error == pytest.approx(found.draw_error.square().sum().sqrt().item() / 40)
    assert found.standard_error == pytest.approx(found.log_prob.std().item() / math.sqrt(40))


def test_one_draw_has_no_error() -> None:
    one = nested_likelihood(Model(), Guide(), data(2), num_particles=2, num_draws=1)
    assert isinstance(one, NestedEstimate)
    assert math.isnan(one.monte_carlo_error)
    assert "Monte-Carlo" not in str(one)
    assert "one draw of w" in str(one)
    assert json.loads(json.dumps(one.to_dict(), allow_nan=False))["monte_carlo_error"] is None


def plain(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(SIZE), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_what_has_no_such_bound_is_refused() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x, 0.7).to_event(1))

    with pytest.raises(ValueError, match=r"whose density is only bounded, .* got exact densities of z: take"):
        nested_likelihood(plain, guide, data(4))
    late = Guide()
    late.last = True
    for model, program, order in ((Model(), late, "guide"), (Model(last=True), Guide(), "model")):
        with pytest.raises(ValueError, match=f"{order} must draw w, .* before its other latents, .* z, w"):
            nested_likelihood(model, program, data(4))
    with pytest.raises(ValueError, match="model and guide must have the same latents"):
        nested_likelihood(Model(), guide, data(4))
    broken = Model()
    with torch.no_grad():
        broken.gain.fill_(math.nan)
    with pytest.raises(ValueError, match="nan"):
        nested_likelihood(broken, Guide(), data(4))
    x = data(40)
    x[37, 1] = math.nan
    with pytest.raises(ValueError, match="bounds must not be NaN, got NaN for datum 37"):
        nested_likelihood(Model(), Guide(), x, num_particles=2)


@pytest.mark.parametrize("name", ["num_particles", "num_draws", "num_times", "batch_size"])
def test_bad_sizes_are_named(name: Any) -> None:
    sizes: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        nested_likelihood(Model(), Guide(), data(4), **sizes)


def test_the_worst_draw_of_u_carries_the_evidence_of_its_weights() -> None:
    model, guide = Model(), Guide()
    torch.manual_seed(0)
    x = torch.randn(5, SIZE)
    found = nested_likelihood(model, guide, x, num_particles=40, num_draws=3)
    assert found.pareto_k is not None
    assert found.ess is not None
    assert found.ess.shape == found.pareto_k.shape == (5,)
    assert bool(((found.ess >= 1) & (found.ess <= 40 + 1e-9)).all())
    assert found.to_dict()["khat_share"] == found.khat_share
    few = nested_likelihood(model, guide, x, num_particles=4)
    assert few.to_dict()["khat_share"] is None
    assert "k-hat" not in str(few)
    bad = replace(found, pareto_k=torch.tensor([2.0, 0.1, 0.1, 0.1, math.nan]))
    assert bad.khat_share == 0.25
    assert "k-hat too high for 25.0 % (the bound is low there: more particles)" in str(bad)
