"""Recorded densities of an annealing path: those of the programs to the bit, without running these."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.evaluation import annealed_likelihood, path
from pvae.evaluation.layout import layout_of
from pvae.evaluation.path import Path, Paths
from pvae.inference.isolation import evaluating
from tests.evaluation.products import Products
from tests.evaluation.test_annealing import networks
from tests.inference.programs import LinearGuide, LinearModel

pytestmark = pytest.mark.usefixtures("float64")


def ladder() -> tuple[Any, Any, Tensor]:
    """The ladder of `networks`, for tests that look into it."""
    return networks("ladder")


def fields(point: Any) -> list[Tensor]:
    return [point.log_start, point.log_end, point.grad_start, point.grad_end]


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("kind", ["normal", "flow", "five", "hvae", "ladder"])
def test_a_recording_is_the_programs_to_the_bit(kind: str, start: str) -> None:
    model, guide, x = networks(kind)
    origin = guide if start == "guide" else None
    with evaluating(model, guide):
        layout = layout_of(model, x, None)
        recorded = Paths(model, origin, layout, states=10**6, evaluations={4: 1000})(x, None)
        plain = Path(model, origin, x, None, layout)
        for _ in range(2):
            z = torch.randn(4, len(x), layout.size)
            for one, other in zip(fields(recorded(z)), fields(plain(z)), strict=True):
                assert torch.equal(one, other)


def test_densities_and_gradients_are_those_written_out() -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(3, 5)
    z = torch.randn(4, 3, 3)
    with evaluating(model, guide):
        point = Path(model, guide, x, None, layout_of(model, x, None))(z)
        weight, bias = model.decoder.weight, model.decoder.bias
        residual = x - z @ weight.T - bias
        loc, log_scale = guide.encoder(x).chunk(2, -1)
    torch.testing.assert_close(point.grad_end, residual @ weight - z)
    torch.testing.assert_close(point.grad_start, -(z - loc) / (2 * log_scale).exp())
    standard = dist.Normal(0.0, 1.0)
    log_p = standard.log_prob(z).sum(-1) + standard.log_prob(residual).sum(-1)
    torch.testing.assert_close(point.log_end, log_p)
    torch.testing.assert_close(point.log_start, dist.Normal(loc, log_scale.exp()).log_prob(z).sum(-1))


def test_features_of_x_are_computed_once() -> None:
    model, guide, x = ladder()
    with evaluating(model, guide):
        layout = layout_of(model, x, None)
        densities = Paths(model, guide, layout, states=10**6, evaluations={4: 1000})(x, None)
        z = torch.randn(4, len(x), layout.size)
        densities(z)
        with Products(guide.bottom_up.stem, model.top_down.read[-1]) as rows:
            densities(z)
            densities(z + 1)
    assert rows.counts == [0, 2 * 4 * len(x)]


def test_what_a_guide_shares_with_the_model_runs_once() -> None:
    """Also where nothing is recorded: the model takes over the guide's way down."""
    model, guide, x = ladder()
    with evaluating(model, guide):
        layout = layout_of(model, x, None)
        densities = Path(model, guide, x, None, layout)
        lift = model.top_down.blocks[0].net[0]
        with Products(lift) as rows:
            densities(torch.randn(4, len(x), layout.size))
    assert rows[0] == 4 * len(x)


def test_estimates_do_not_depend_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, x = networks("hvae")
    found = []
    for least in (10**9, 1):
        monkeypatch.setattr(path, "_WORTHWHILE", least)
        found.append(annealed_likelihood(model, guide, x, num_steps=4, num_chains=3))
    assert torch.equal(found[0].log_prob, found[1].log_prob)


def test_programs_that_cannot_be_recorded_are_run() -> None:
    runs = []

    class Reading(nn.Module):
        def forward(self, x: Tensor) -> None:
            runs.append(len(x))
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                loc = z @ z.new_ones(3, 5) if float(z.sum()) != 0.5 else x
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    model, guide, x = Reading(), LinearGuide(), torch.randn(3, 5)
    layout = layout_of(model, x, None)
    with evaluating(model, guide):
        densities = Paths(model, guide, layout, states=10**6, evaluations={4: 1000})(x, None)
        z = torch.randn(4, 3, 3)
        del runs[:]
        for _ in range(5):
            found = fields(densities(z))
        wanted = fields(Path(model, guide, x, None, layout)(z))
    assert len(runs) >= 6
    assert all(map(torch.equal, found, wanted))


def test_constants_that_are_written_to_are_left_in_the_graph() -> None:
    class Counting(nn.Module):
        """Adds z to features of x in place: as a constant they would grow from run to run."""

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
                features = (x.exp() + 1).expand(z.shape).clone()
                features[...] += z.detach()
                pyro.sample("x", dist.Normal(features + z, 1.0).to_event(1), obs=x)

    model, guide, x = Counting(), None, torch.randn(3, 5)
    layout = layout_of(model, x, None)
    with evaluating(model):
        densities = Paths(model, guide, layout, states=10**6, evaluations={4: 1000})(x, None)
        plain = Path(model, guide, x, None, layout)
        for _ in range(3):
            z = torch.randn(4, 3, 5)
            assert all(map(torch.equal, fields(densities(z)), fields(plain(z))))
