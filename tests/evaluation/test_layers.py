"""Layers one by one: linear-Gaussian programs whose KLs are known, latents that are used and that are not."""

import json
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pvae.data import from_tensors
from pvae.distributions import CodeMixture, Diffusion
from pvae.evaluation import exchanged_kl, layer_report

from .programs import Encoding, Latent, Layers

pytestmark = pytest.mark.usefixtures("float64")

Array = NDArray[np.float64]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TwoLevels(nn.Module):
    """z_2 ~ N(0, I_2), z_1 ~ N(C z_2, s^2) of three numbers, x ~ N(z_1, 1).

    As a guide: z_2 ~ N(A x, a^2), z_1 ~ N(B x + F z_2, b^2).
    """

    A: Tensor
    B: Tensor
    C: Tensor
    F: Tensor

    def __init__(self, changed: dict[str, Tensor], guide: bool = False) -> None:
        super().__init__()
        self.guide = guide
        numbers = {
            "C": draws(3, 2, seed=1),
            "s": torch.tensor([0.7, 1.1, 1.9]),
            "A": 0.3 * draws(2, 3, seed=2),
            "a": torch.tensor([0.5, 0.8]),
            "B": 0.4 * draws(3, 3, seed=3),
            "F": draws(3, 2, seed=4),
            "b": torch.tensor([0.3, 0.6, 0.9]),
            **changed,
        }
        for name, value in numbers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if self.guide:
                above = pyro.sample("z_2", dist.Normal(x @ self.A.T, self.a).to_event(1))
                below = x @ self.B.T + above @ self.F.T
                pyro.sample("z_1", dist.Normal(below, self.b).to_event(1))
                return
            above = pyro.sample("z_2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            below = pyro.sample("z_1", dist.Normal(above @ self.C.T, self.s).to_event(1))
            pyro.sample("x", dist.Normal(below, 1.0).to_event(1), obs=x)

    def array(self, name: str) -> Array:
        return np.asarray(getattr(self, name))


def pair(**changed: Tensor) -> tuple[TwoLevels, TwoLevels]:
    return TwoLevels(changed), TwoLevels(changed, guide=True)


def exact_kl(program: TwoLevels, x: Array) -> dict[str, Array]:
    """KL of each number of both layers, each ``(N, numbers)``, that of z_1 in expectation over z_2."""
    C, s, A, a, B, F, b = (program.array(name) for name in "CsAaBFb")
    top = 0.5 * ((x @ A.T) ** 2 + a**2 - 1) - np.log(a)
    gap = (x @ (B + (F - C) @ A).T) ** 2 + ((F - C) ** 2) @ a**2
    return {"z_2": top, "z_1": 0.5 * ((gap + b**2) / s**2 - 1) + np.log(s / b)}


def test_rates_are_those_of_the_closed_form() -> None:
    model, guide = pair()
    x = draws(200, 3)
    found = layer_report(model, guide, x, num_samples=1500)
    assert [layer.name for layer in found.layers] == ["z_2", "z_1"]
    exact = exact_kl(model, x.numpy())
    top, below = found["z_2"], found["z_1"]
    assert top.closed_form
    assert below.closed_form
    np.testing.assert_allclose(top.kl, exact["z_2"].sum(-1), rtol=1e-9)
    assert top.kl_map is not None
    assert below.kl_map is not None
    np.testing.assert_allclose(top.kl_map, exact["z_2"].mean(0), rtol=1e-9)
    # Of the latents above, 1,500 draws.
    np.testing.assert_allclose(below.kl, exact["z_1"].sum(-1), rtol=0.25)
    np.testing.assert_allclose(below.kl_map, exact["z_1"].mean(0), rtol=0.01)
    assert below.mean == pytest.approx(exact["z_1"].sum(-1).mean(), rel=0.005)
    error = exact["z_2"].sum(-1).std(ddof=1) / math.sqrt(200)
    assert top.standard_error == pytest.approx(error, rel=1e-9)
    assert torch.equal(found.kl, top.kl + below.kl)


def test_a_kl_that_does_not_hang_on_the_parents_is_exact() -> None:
    shared = draws(3, 2, seed=9)
    model, guide = pair(C=shared, F=shared)
    x = draws(30, 3)
    found = layer_report(model, guide, x, num_samples=2)
    np.testing.assert_allclose(found["z_1"].kl, exact_kl(model, x.numpy())["z_1"].sum(-1), rtol=1e-9)


def test_latents_without_dimensions_count_as_one_number() -> None:
    x = draws(10, 3)
    found = layer_report(Layers(), Layers(guide=True), x, num_samples=2)
    below = 0.5 * ((x[:, 2] / 2) ** 2 + 0.25 - 1 - math.log(0.25))
    torch.testing.assert_close(found["z_1"].kl, below)
    assert (found["z_1"].size, found["z_2"].size) == (1, 2)
    assert "| z_1 | 1 |" in found.to_markdown()


def test_the_spread_of_means_with_drawn_parents_is_no_activity() -> None:
    """Without x in the guide nothing moves, however widely the parents scatter the means below."""
    still = {"A": torch.zeros(2, 3), "B": torch.zeros(3, 3), "F": 5 * draws(3, 2, seed=4)}
    x = draws(4000, 3)
    noisy = layer_report(*pair(**still), x, num_samples=4)["z_1"]
    scattered = np.asarray((25 * draws(3, 2, seed=4) ** 2) @ torch.tensor([0.5, 0.8]) ** 2)
    assert (noisy.variance.numpy() < 0.03 * scattered).all()
    model, guide = pair()
    found = layer_report(model, guide, x, num_samples=8)
    np.testing.assert_allclose(
        found["z_2"].variance, (x.numpy() @ guide.array("A").T).var(0, ddof=1), rtol=1e-9
    )
    means = x.numpy() @ (guide.array("B") + guide.array("F") @ guide.array("A")).T
    np.testing.assert_allclose(found["z_1"].variance, means.var(0, ddof=1), rtol=0.1)


def test_a_variance_keeps_its_digits_far_from_zero() -> None:
    x = 1e7 + 1e-3 * draws(3000, 3)
    found = layer_report(Latent(3), Encoding(1.0, 0.0, 1.0), x, num_samples=2)
    np.testing.assert_allclose(found["z"].variance, x.numpy().var(0, ddof=1), rtol=1e-3)


def test_active_units_are_those_above_the_threshold() -> None:
    x = draws(500, 3) * torch.tensor([1.0, 0.2, 0.05])
    for threshold, count in ((0.01, 2), (0.001, 3), (0.5, 1)):
        found = layer_report(Latent(3), Encoding(1.0, 0.0, 0.5), x, threshold=threshold)
        assert found["z"].active == count


@pytest.mark.parametrize(("loud", "share"), [(5, 2 / 3), (6, 1 / 3)])
def test_a_number_is_collapsed_if_it_is_quiet_for_95_percent(loud: int, share: float) -> None:
    """Of three numbers one is the prior throughout, one has KL of 0.5 for some data, one for all."""
    x = torch.zeros(100, 3)
    x[:loud, 1] = 1.0
    x[:, 2] = 1.0
    found = layer_report(Latent(3), Encoding(1.0, 0.0, 1.0), x)
    assert found["z"].collapsed == pytest.approx(share)
    assert found["z"].kl_map is not None
    np.testing.assert_allclose(found["z"].kl_map, [0.0, loud / 200, 0.5], atol=1e-12)


def test_log_variances_at_the_ends_of_their_range_are_counted() -> None:
    prior, posterior = torch.tensor([-10.0, 0.0, 1.0]), torch.tensor([-10.0, -10.0, 0.99])
    changed = {"s": (0.5 * prior).exp(), "b": (0.5 * posterior).exp()}
    model, guide = pair(**changed)
    x = draws(40, 3)
    found = layer_report(model, guide, x, bounds={"z_1": (-10.0, 1.0)})
    assert found["z_2"].at_bounds is None
    shares = found["z_1"].at_bounds
    assert shares is not None
    assert shares["p"] == pytest.approx((1 / 3, 1 / 3))
    assert shares["q"] == pytest.approx((2 / 3, 0.0))
    assert "| 33.3 %, 33.3 % | 66.7 %, 0.0 % |" in found.to_markdown()
    # Single-precision scales are as near to the ends as they can be.
    single = layer_report(model.float(), guide.float(), x.float(), bounds={"z_1": (-10.0, 1.0)})["z_1"]
    assert single.at_bounds == shares


class Mixture(nn.Module):
    """z_2 from a mixture of two normals at -2 and at 2, z_1 ~ N(z_2, 1), x ~ N(z_1, 1)."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        loc = x.new_tensor([[-2.0], [2.0]])
        prior = CodeMixture(x.new_zeros(2), loc, torch.ones_like(loc), kl_mode="variational")
        with pyro.plate("data", len(x), dim=-1):
            above = pyro.sample("z_2", prior)
            below = pyro.sample("z_1", dist.Normal(above, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(below, 1.0).to_event(1), obs=x)


def chain(x: Tensor, y: Tensor | None = None) -> None:
    """z_2 ~ N(x, 0.7^2), z_1 ~ N(z_2, 0.5^2)."""
    with pyro.plate("data", len(x), dim=-1):
        above = pyro.sample("z_2", dist.Normal(x, 0.7).to_event(1))
        pyro.sample("z_1", dist.Normal(above, 0.5).to_event(1))


def test_a_mixture_is_averaged_over_draws_whatever_bound_it_registers() -> None:
    from scipy import stats

    x = draws(6, 1)
    found = layer_report(Mixture(), chain, x, num_samples=20_000)
    top = found["z_2"]
    assert not top.closed_form
    assert top.kl_map is None
    assert top.collapsed is None
    assert "| z_2 | 1 |" in found.to_markdown()
    grid = np.linspace(-9, 9, 20_001)
    p = 0.5 * (stats.norm.pdf(grid, -2) + stats.norm.pdf(grid, 2))
    for i, loc in enumerate(x[:, 0].tolist()):
        q = stats.norm.pdf(grid, loc, 0.7)
        log_ratio = np.where(q > 0, np.log(np.maximum(q, 1e-300) / p), 0)
        assert top.kl[i].item() == pytest.approx((q * log_ratio).sum() * (grid[1] - grid[0]), abs=0.05)
    torch.testing.assert_close(found["z_1"].kl, torch.full((6,), 0.5 * (0.25 - 1 - math.log(0.25))))


class Bounded(nn.Module):
    """z under a diffusion whose network predicts no noise at all."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        ends = x.new_tensor(-6.0), x.new_tensor(7.0)
        prior = Diffusion(self.none, ends, (3,), "vlb", prediction="eps")
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def none(self, y: Tensor, gamma: Tensor) -> Tensor:
        self.asked += 1
        return torch.zeros_like(y)


def test_a_bound_on_a_density_may_stand_in_a_rate() -> None:
    x, model = draws(400, 3), Bounded()
    found = layer_report(model, Encoding(1.0, 0.0, 0.5), x, num_samples=50)["z"]
    assert not found.closed_form
    # The three terms of the bound, each in expectation over noise, and the entropy of q.
    square = x.numpy() ** 2 + 0.25
    first = 1.5 * (math.log(2 * math.pi) - 6 + 1)
    diffusion = 13 * 3 / 2
    fading, noise = 1 / (1 + math.exp(7)), 1 / (1 + math.exp(-7))
    last = 0.5 * (fading * square + noise - math.log(noise) - 1).sum(-1)
    entropy = 1.5 * (math.log(2 * math.pi * 0.25) + 1)
    expected = first + diffusion + last - entropy
    assert found.mean == pytest.approx(expected.mean(), abs=4 * found.standard_error)
    assert found.standard_error < 0.15
    assert model.asked < 10  # never run freely, which takes a hundred steps


def test_draws_of_a_datum_depend_on_its_position_alone() -> None:
    model, guide = pair()
    x = draws(1100, 3)
    whole, few = (layer_report(model, guide, part, seed=3) for part in (x, x[:50]))
    for name in ("z_2", "z_1"):
        assert torch.equal(whole[name].kl[:50], few[name].kl)
    assert not torch.equal(layer_report(model, guide, x, seed=4)["z_1"].kl, whole["z_1"].kl)


def test_nothing_is_left_changed() -> None:
    model, guide = Latent(3), Encoding()
    before = torch.get_rng_state()
    layer_report(model, guide, draws(30, 3))
    exchanged_kl(*pair(), draws(30, 3), site="z_2")
    assert torch.equal(torch.get_rng_state(), before)
    assert guide.training
    assert guide.dropout.training
    assert len(pyro.get_param_store()) == 0


def test_labels_of_a_split_reach_a_conditional_model() -> None:
    y = torch.arange(40) % 2
    x = draws(40, 3)
    data = from_tensors(x, test=x, y={"train": y, "test": y})
    found = layer_report(Latent(3, label_weight=2.0), Encoding(0.0, 0.0, 1.0), data.test, num_samples=2)
    torch.testing.assert_close(found["z"].kl, 0.5 * 3 * (2.0 * y) ** 2)
    assert found.protocol == data.test.protocol.to_dict()


def test_record_and_table() -> None:
    model, guide = pair()
    found = layer_report(model, guide, draws(30, 3))
    train = layer_report(model, guide, draws(50, 3, seed=8))
    record = json.loads(json.dumps(found.to_dict()))
    assert record["layers"]["z_1"]["kl"] == found["z_1"].mean
    assert record["layers"]["z_1"]["shape"] == [3]
    assert record["kl"] == pytest.approx(found["z_2"].mean + found["z_1"].mean)
    table = found.to_markdown(train).splitlines()
    assert [line.count("|") for line in table] == [8] * 5
    gap = found["z_1"].mean - train["z_1"].mean
    error = math.hypot(found["z_1"].standard_error, train["z_1"].standard_error)
    assert f"| {gap:+.3f} ± {error:.3f} |" in table[3]
    assert "training" not in found.to_markdown()
    assert str(found).startswith(f"KL {float(found.kl.mean()):.2f} ± ")


class Image(nn.Module):
    """z of shape (2, 3, 4) ~ N(0, 1), x ~ N(z, 1); as a guide z ~ N(x, 1)."""

    def __init__(self, guide: bool = False) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x if self.guide else torch.zeros_like(x), 1.0).to_event(3))
            if not self.guide:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(3), obs=x)


def test_the_map_of_an_image_adds_up_its_channels() -> None:
    x = draws(20, 2, 3, 4)
    found = layer_report(Image(), Image(guide=True), x, num_samples=2)["z"]
    assert found.plane is not None
    torch.testing.assert_close(found.plane, 0.5 * x.square().mean(0).sum(0))
    assert float(found.plane.sum()) == pytest.approx(found.mean)
    assert np.asarray(found.to_dict()["kl_plane"]).shape == (3, 4)
    assert "| 2 x 3 x 4 = 24 |" in layer_report(Image(), Image(guide=True), x).to_markdown()


def test_a_latent_that_is_not_looked_at_moves_nothing() -> None:
    model, guide = pair(C=torch.zeros(3, 2), F=torch.zeros(3, 2))
    found = exchanged_kl(model, guide, draws(60, 3), site="z_2")
    assert torch.equal(found.rise, torch.zeros(60))
    assert not found.used
    np.testing.assert_allclose(
        found.own["z_1"], exact_kl(model, draws(60, 3).numpy())["z_1"].sum(-1), rtol=1e-9
    )


def test_a_latent_that_is_looked_at_raises_the_kl_below() -> None:
    """The prior of z_1 follows z_2, its posterior x alone: with that of another datum they part."""
    x = draws(400, 3)
    changed = {
        "A": torch.eye(3)[:2],
        "a": torch.tensor([0.01, 0.01]),
        "B": torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]]),
        "C": torch.eye(3)[:, :2],
        "F": torch.zeros(3, 2),
    }
    model, guide = pair(**changed)
    found = exchanged_kl(model, guide, x, site="z_2", num_samples=2)
    assert found.used
    assert list(found.own) == ["z_1"]
    s = model.array("s")[:2]
    apart = (x[:, None, :2] - x[None, :, :2]).numpy() ** 2 / (2 * s**2)
    expected = apart.sum(-1).sum() / (400 * 399)  # over all pairs of two data
    error = float(found.rise.std() / 20)
    assert float(found.rise.mean()) == pytest.approx(expected, abs=4 * error)
    own = exact_kl(model, x.numpy())["z_1"].sum(-1)
    np.testing.assert_allclose(found.own["z_1"], own, atol=0.1)
    record = json.loads(json.dumps(found.to_dict()))
    assert record["used"]
    assert record["layers"]["z_1"]["other"] == pytest.approx(own.mean() + expected, abs=4 * error)
    assert f"| z_1 | {record['layers']['z_1']['own']:.3f} |" in found.to_markdown()


class Follows(nn.Module):
    """z_2 and z_1 near x in the guide; z_1 ~ N(z_2, 1) in the model: its KL shows whose z_2 it was given."""

    def __init__(self, guide: bool = False) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if self.guide:
                pyro.sample("z_2", dist.Normal(x, 1e-9).to_event(1))
                pyro.sample("z_1", dist.Normal(x, 1.0).to_event(1))
                return
            above = pyro.sample("z_2", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            below = pyro.sample("z_1", dist.Normal(above, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(below, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(("num", "num_samples"), [(2, 2), (3, 2), (9, 2), (7, 4096), (3, 4096)])
def test_no_datum_is_given_its_own(num: int, num_samples: int) -> None:
    x = 2.0 ** torch.arange(num).unsqueeze(-1)  # any two have a distance of their own
    found = exchanged_kl(Follows(), Follows(guide=True), x, site="z_2", num_samples=num_samples)
    np.testing.assert_allclose(found.own["z_1"], 0, atol=1e-9)
    distance = (2 * found.other["z_1"]).sqrt()
    pairs = (x - x.T).abs()
    givers = [int((pairs[i] - distance[i]).abs().argmin()) for i in range(num)]
    np.testing.assert_allclose(distance, [float(pairs[i, j]) for i, j in enumerate(givers)], rtol=1e-5)
    assert all(i != j for i, j in enumerate(givers))
    assert sorted(givers) == list(range(num))


def apart(x: Tensor, y: Tensor | None = None) -> None:
    """Two latents that know nothing of each other, the lower one under a mixture."""
    loc = x.new_tensor([[-2.0], [2.0]])
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z_2", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        below = pyro.sample("z_1", CodeMixture(x.new_zeros(2), loc, torch.ones_like(loc)))
        pyro.sample("x", dist.Normal(below, 1.0).to_event(1), obs=x)


def test_noise_below_is_the_same_with_either() -> None:
    """A KL that is one of draws does not move by their chance."""
    found = exchanged_kl(apart, Follows(guide=True), draws(20, 1), site="z_2", num_samples=1)
    assert torch.equal(found.rise, torch.zeros(20))
    assert float(found.own["z_1"].std()) > 0.1


def nan_guide(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x), dim=-1):
        scale = torch.where(x > 5, math.inf, 1.0)
        pyro.sample("z", dist.Normal(x, scale, validate_args=False).to_event(1))


REFUSED: list[tuple[Any, str]] = [
    (lambda: layer_report(*pair(), draws(4, 3), num_samples=1), "num_samples must be at least 2, got 1"),
    (lambda: layer_report(*pair(), draws(1, 3)), "x must hold at least two data, got 1"),
    (lambda: exchanged_kl(*pair(), draws(1, 3), site="z_2"), "x must hold at least two data, got 1"),
    (
        lambda: exchanged_kl(*pair(), draws(4, 3), site="z_2", num_samples=0),
        "num_samples must be positive, got 0",
    ),
    (
        lambda: exchanged_kl(*pair(), draws(4, 3)),
        "site must be a latent above others, one of z_2, got 'u'",
    ),
    (
        lambda: exchanged_kl(Latent(3), Encoding(), draws(4, 3), site="z"),
        "site must be a latent above others, one of none, got 'z'",
    ),
    (
        lambda: layer_report(TwoLevels({}), Encoding(), draws(4, 3)),
        "model and guide must have the same latents",
    ),
    (
        lambda: layer_report(Latent(1), nan_guide, torch.tensor([[0.0], [0.0], [6.0]])),
        "KL of z must be finite, got nan for datum 2",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals_name_what_came(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
