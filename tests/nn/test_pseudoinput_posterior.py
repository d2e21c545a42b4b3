"""r(u | x): its density, its one learned tensor and the ends of that tensor's range."""

import copy
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from pvae.nn import DCTPseudoinput, LinearPseudoinput, PseudoinputPosterior
from tests.distributions.tracing import assert_traceable

SHAPE = (2, 8, 6)


def f() -> DCTPseudoinput:
    return DCTPseudoinput(SHAPE, 3, torch.full((2, 3, 3), 5.0, dtype=torch.float64))


def image(*batch: int) -> Tensor:
    return torch.rand(*batch, *SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (5,), (4, 5)])
def test_density(batch: tuple[int, ...]) -> None:
    r = PseudoinputPosterior(f()).double()
    with torch.no_grad():
        r.rho.uniform_(-11.0, -4.0)
    x, u = image(*batch), torch.randn(*batch, 2, 3, 3, dtype=torch.float64)
    density = r(x)
    assert (density.batch_shape, density.event_shape) == (batch, (2, 3, 3))
    expected = stats.norm(f()(x).numpy(), r.rho.detach().div(2).exp().numpy()).logpdf(u.numpy())
    torch.testing.assert_close(
        density.log_prob(u), torch.as_tensor(expected.sum((-3, -2, -1))), rtol=1e-12, atol=0
    )


@pytest.mark.usefixtures("float64")
def test_draws() -> None:
    r = PseudoinputPosterior(f(), log_variance=-3.0)
    x = image()
    z = ((r(x).rsample((4000,)) - f()(x)) / math.exp(-1.5)).detach().flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_entropy_at_the_start() -> None:
    """At 49 coefficients of log-variance -6 the entropy is -77.5 nats."""
    r = PseudoinputPosterior(DCTPseudoinput((1, 28, 28), 7, torch.ones(1, 7, 7)))
    entropy = r(torch.zeros(1, 28, 28)).entropy().item()
    assert entropy == pytest.approx(49 / 2 * (math.log(2 * math.pi * math.e) - 6), rel=1e-6)
    assert entropy == pytest.approx(-77.5, abs=0.05)


class TestGradient:
    @pytest.mark.usefixtures("float64")
    def test_it_flows_through_u_to_rho_and_nothing_else(self) -> None:
        pseudoinput = f()
        r = PseudoinputPosterior(pseudoinput)
        pseudoinput.context(r(image(5)).rsample()).square().sum().backward()
        assert [name for name, _ in r.named_parameters()] == ["rho"]
        assert r.rho.grad is not None
        assert r.rho.grad.abs().min() > 0
        assert list(pseudoinput.parameters()) == []
        assert [buffer.requires_grad for buffer in pseudoinput.buffers()] == [False] * 3

    @pytest.mark.usefixtures("float64")
    def test_it_is_half_the_noise(self) -> None:
        r = PseudoinputPosterior(f())
        x, weight = image(5), torch.randn(5, 2, 3, 3)
        u = r(x).rsample()
        (u * weight).sum().backward()
        expected = (weight * 0.5 * (u - f()(x))).sum(0).detach()
        torch.testing.assert_close(r.rho.grad, expected)

    @pytest.mark.usefixtures("float64")
    def test_a_learned_map_has_its_gradient_and_its_owner(self) -> None:
        pseudoinput = LinearPseudoinput(SHAPE, 3)
        r = PseudoinputPosterior(pseudoinput)
        assert r.pseudoinput is pseudoinput
        assert [name for name, _ in r.named_parameters()] == ["rho"]
        r(image(5)).rsample().square().sum().backward()
        assert pseudoinput.down.weight.grad is not None
        assert pseudoinput.down.weight.grad.abs().min() > 0

    def test_a_fixed_variance_has_none(self) -> None:
        r = PseudoinputPosterior(f(), log_variance=-4.0, learned=False)
        assert list(r.parameters()) == []
        assert not r(image(3)).rsample().requires_grad
        assert torch.equal(r.state_dict()["rho"], torch.full((2, 3, 3), -4.0))

    @pytest.mark.usefixtures("float64")
    def test_traceable(self) -> None:
        r, u = PseudoinputPosterior(f()), torch.randn(3, 2, 3, 3)

        def density(x: Tensor, rho: Tensor) -> Tensor:
            value: Tensor = torch.func.functional_call(r, {"rho": rho}, (x,)).log_prob(u)
            return value

        rho = torch.tensor([-13.0, -6.0, -2.0]).expand(2, 3, 3).contiguous()
        assert_traceable(density, (image(3), rho.clone().requires_grad_()), (image(3), rho))


class TestBounds:
    def test_the_variance_is_clamped(self) -> None:
        r = PseudoinputPosterior(f())
        with torch.no_grad():
            r.rho[0].fill_(-40.0)
            r.rho[1].fill_(0.5)
        assert (r.log_variance[0] == -12.0).all()
        assert (r.log_variance[1] == -3.0).all()
        scale = r(image()).base_dist.scale
        torch.testing.assert_close(scale[0].detach(), torch.full((3, 3), math.exp(-6.0)))

    @pytest.mark.parametrize(
        ("rho", "slope", "passes"),
        [
            (-6.0, 1.0, True),
            (-6.0, -1.0, True),
            (-3.0, 1.0, True),
            (-3.0, -1.0, False),
            (-2.9, 1.0, True),
            (-2.9, -1.0, False),
            (-12.0, 1.0, False),
            (-12.0, -1.0, True),
            (-12.1, 1.0, False),
            (-12.1, -1.0, True),
        ],
    )
    def test_a_step_beyond_the_range_is_refused_and_one_back_is_not(
        self, rho: float, slope: float, passes: bool
    ) -> None:
        r = PseudoinputPosterior(f())
        with torch.no_grad():
            r.rho.fill_(rho)
        (slope * r.log_variance).sum().backward()
        assert r.rho.grad is not None
        assert (r.rho.grad == (slope if passes else 0.0)).all()

    def test_a_variance_pressed_against_its_end_comes_back(self) -> None:
        r = PseudoinputPosterior(f(), bounds=(-12.0, -5.0))
        optimizer = torch.optim.Adam(r.parameters(), lr=0.1)
        for target, end in ((-1.0, -5.0), (-8.0, -8.0)):
            for _ in range(400):
                optimizer.zero_grad()
                (r.log_variance - target).square().sum().backward()
                optimizer.step()
            torch.testing.assert_close(r.log_variance.detach(), torch.full((2, 3, 3), end), atol=1e-2, rtol=0)
            assert r.share_at_bounds() == (1.0 if target == -1.0 else 0.0)
            assert r.rho.max() < -3.5  # Adam's momentum takes it ten steps beyond, not four hundred

    def test_share_at_bounds(self) -> None:
        r = PseudoinputPosterior(f())
        assert r.share_at_bounds() == 0.0
        with torch.no_grad():
            r.rho[0, 0] = torch.tensor([-3.0, -2.0, -3.1])
            r.rho[1, 2] = torch.tensor([-12.0, -12.5, -11.9])
        assert r.share_at_bounds().item() == pytest.approx(4 / 18)
        assert r.share_at_bounds().shape == ()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"log_variance": -2.0}, r"log_variance must lie in bounds \(-12\.0, -3\.0\), got -2"),
            (
                {"log_variance": -6.0, "bounds": (-5.0, -4.0)},
                r"log_variance must lie in bounds \(-5\.0, -4\.0\), got -6",
            ),
            ({"log_variance": math.nan}, "log_variance must lie in bounds"),
            ({"bounds": (-3.0, -12.0)}, r"bounds must be in order, got \(-3\.0, -12\.0\)"),
        ],
    )
    def test_refusals(self, options: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PseudoinputPosterior(f(), **options)  # type: ignore[arg-type]

    def test_wrong_shape(self) -> None:
        with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 2, 8, 6\), got \(3, 8, 6\)"):
            PseudoinputPosterior(f())(torch.zeros(3, 8, 6))


def test_state_dict_and_deepcopy() -> None:
    r, other = PseudoinputPosterior(f()), PseudoinputPosterior(f(), log_variance=-9.0)
    other.load_state_dict(r.state_dict())
    assert list(r.state_dict()) == ["rho"]
    x = image(2)
    for twin in (other, copy.deepcopy(r)):
        assert torch.equal(twin(x).stddev, r(x).stddev)
        assert torch.equal(twin(x).mean, r(x).mean)
