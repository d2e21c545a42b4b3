"""The normal of an encoder's Jacobian against SciPy, autograd's Jacobian and closed forms."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from pvae.distributions import FreeFormNormal, JacobianNormal, laplace_normal
from tests.distributions.tracing import host_syncs

pytestmark = pytest.mark.usefixtures("float64")

X_DIM, Z_DIM = 6, 3


class Counted(nn.Module):
    """A small smooth network that counts its calls."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(in_dim, 7), nn.Tanh(), nn.Linear(7, out_dim))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


def networks(seed: int = 0) -> tuple[Counted, Counted]:
    torch.manual_seed(seed)
    return Counted(X_DIM, Z_DIM), Counted(Z_DIM, X_DIM)


NOISES: dict[str, Callable[[], Tensor]] = {
    "one": lambda: torch.tensor(0.4),
    "per number of x": lambda: torch.linspace(0.2, 0.9, X_DIM),
    "per datum": lambda: 0.2 + torch.rand(4, X_DIM, generator=torch.Generator().manual_seed(1)),
}


def made(noise: Tensor, **options: Any) -> tuple[JacobianNormal, Counted, Counted, Tensor]:
    encoder, decoder = networks()
    x = torch.randn(4, X_DIM)
    return JacobianNormal(encoder, decoder, x, noise, Z_DIM, **options), encoder, decoder, x


def covariance(encoder: Counted, x: Tensor, noise: Tensor) -> Tensor:
    rows = jacobian(encoder.net, x)
    return rows @ noise.expand(X_DIM).square().diag() @ rows.T


def half_log_det(encoder: Counted, x: Tensor, noise: Tensor) -> Tensor:
    """Sum over data, differentiable, from Jacobians by double reverse mode."""
    noise = noise.expand(x.shape)
    total = x.new_zeros(())
    for row, scale in zip(x, noise, strict=True):
        j = jacobian(encoder.net, row, create_graph=True) * scale
        total = total + 0.5 * torch.linalg.slogdet(j @ j.T).logabsdet
    return total


@pytest.mark.parametrize("kind", NOISES)
def test_log_prob_is_the_normal_with_the_jacobians_covariance(kind: str) -> None:
    noise = NOISES[kind]()
    q, encoder, _, x = made(noise)
    z = q.sample()
    exact = q.exact()
    assert q.batch_shape == exact.batch_shape == (4,)
    for i in range(4):
        wanted = covariance(encoder, x[i], noise.expand(4, X_DIM)[i])
        torch.testing.assert_close(exact.covariance_matrix[i], wanted, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(q.variance[i], wanted.diagonal(), rtol=1e-10, atol=1e-14)
        normal = stats.multivariate_normal(encoder.net(x[i]).detach().numpy(), wanted.numpy())
        assert q.log_prob(z)[i].item() == pytest.approx(normal.logpdf(z[i].numpy()), rel=1e-9)
        assert q.entropy()[i].item() == pytest.approx(normal.entropy(), rel=1e-9)
    torch.testing.assert_close(q.mean, encoder.net(x))


@pytest.mark.parametrize("logdet", ["surrogate", "exact"])
def test_draws_have_the_covariance_of_the_jacobian(logdet: Any) -> None:
    noise = NOISES["per number of x"]()
    q, encoder, _, x = made(noise, logdet=logdet)
    z = q.expand((20_000, 4)).rsample()
    assert z.shape == (20_000, 4, Z_DIM)
    for i in range(4):
        wanted = covariance(encoder, x[i], noise)
        draws = z[:, i].detach()
        factor = torch.linalg.cholesky(wanted)
        whitened = torch.linalg.solve_triangular(factor, (draws - q.mean[i].detach()).T, upper=False)
        torch.testing.assert_close(whitened @ whitened.T / 20_000, torch.eye(Z_DIM), rtol=0, atol=0.05)
        assert whitened.mean(1).abs().max() < 0.04


def test_laplace_is_the_inverse_of_the_hessian() -> None:
    noise, prior_scale = NOISES["per number of x"](), torch.tensor([0.5, 1.0, 2.0])
    q, encoder, decoder, x = made(noise)
    normal = q.expand((2, 4)).laplace(prior_scale)
    assert normal.batch_shape == (2, 4)
    for i in range(4):
        loc = encoder.net(x[i]).detach()
        columns = jacobian(decoder.net, loc).numpy()
        precision = (
            np.diag(prior_scale.numpy() ** -2.0) + columns.T @ np.diag(noise.numpy() ** -2.0) @ columns
        )
        wanted = torch.from_numpy(np.linalg.inv(precision))
        torch.testing.assert_close(normal.covariance_matrix[0, i], wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(normal.mean[1, i], loc)


def test_laplace_keeps_the_prior_in_single_precision() -> None:
    # The decoder is steep in one latent and flat in the other, which only the prior holds.
    weight = torch.tensor([[3000.0, 3000.0], [3000.0, 3000.0], [0.0, 1.0]])
    normal = laplace_normal(torch.zeros(2).float(), lambda z: z @ weight.T.float(), torch.tensor(1.0).float())
    wanted = np.linalg.inv(np.eye(2) + weight.double().numpy().T @ weight.double().numpy())
    np.testing.assert_allclose(normal.covariance_matrix.double().numpy(), wanted, rtol=1e-3)


@pytest.mark.parametrize("kind", ["one", "per number of x", "per datum"])
@pytest.mark.parametrize("logdet", ["pinv", "exact"])
def test_entropy_gradient_is_that_of_the_exact_log_determinant(kind: str, logdet: Any) -> None:
    noise = NOISES[kind]().requires_grad_()
    probes = Z_DIM if logdet == "pinv" else 1
    q, encoder, _, x = made(noise, logdet=logdet, num_probes=probes)
    z = q.rsample()
    parts = q.score_parts(z)
    leaves = [noise, *encoder.parameters()]
    ours = torch.autograd.grad(-parts.entropy_term.sum(), leaves, allow_unused=True, retain_graph=True)
    wanted = torch.autograd.grad(half_log_det(encoder, x, noise), leaves, allow_unused=True)
    for a, b, leaf in zip(ours, wanted, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(-parts.log_prob.detach(), q.entropy().detach())


def surrogate(encoder: Counted, decoder: Counted, x: Tensor) -> Tensor:
    """Trace of f' SG[g'] summed over data, in double reverse mode."""
    total = x.new_zeros(())
    for row in x:
        columns = jacobian(decoder.net, encoder.net(row).detach())
        total = total + (jacobian(encoder.net, row, create_graph=True) @ columns).trace()
    return total


def test_a_full_set_of_orthogonal_probes_leaves_no_noise() -> None:
    q, encoder, decoder, x = made(torch.tensor(0.4), num_probes=Z_DIM)
    parameters = list(encoder.parameters())
    wanted = torch.autograd.grad(surrogate(encoder, decoder, x), parameters, allow_unused=True)
    for _ in range(2):
        z = q.rsample()
        ours = torch.autograd.grad(-q.score_parts(z).entropy_term.sum(), parameters, allow_unused=True)
        for a, b in zip(ours, wanted, strict=True):
            assert (a is None or not a.any()) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert q.health is not None
    assert q.health.sum().item() * Z_DIM == pytest.approx(surrogate(encoder, decoder, x).item(), rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": "rademacher"},
        {"directions": "gaussian", "num_probes": 2},
        {"num_probes": 2},
        {"probe": "data"},
    ],
    ids=str,
)
def test_probes_are_unbiased(options: Any) -> None:
    # With unequal noise, whose gradient is partly exact and partly probed: the oracle is the formula of the
    # surrogate for K = J S with S^-1 G in the place of its pseudo-inverse.
    raw = NOISES["per number of x"]().log().requires_grad_()
    encoder, decoder = networks()
    x = torch.randn(1, X_DIM)
    parameters = [p for p in encoder.parameters() if p is not encoder.net[2].bias]
    columns = jacobian(decoder.net, encoder.net(x[0]).detach())
    scale = raw.exp()
    k = jacobian(encoder.net, x[0], create_graph=True) * scale
    held = columns / scale.detach().unsqueeze(-1)
    wanted = list(torch.autograd.grad((k @ held).trace(), [*parameters, raw]))
    # The mean of log s counts z_dim times exactly, where the trace would count tr(J G).
    wanted[-1] = wanted[-1] + (Z_DIM - (k @ held).trace().item()) / X_DIM
    copies, draws = 50, []
    for _ in range(60):
        q = JacobianNormal(encoder, decoder, x.expand(copies, -1), raw.exp(), Z_DIM, **options)
        entropy = -q.score_parts(q.rsample()).entropy_term.mean()
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(entropy, [*parameters, raw])]))
    gradients = torch.stack(draws)
    error = gradients.std(0) / len(draws) ** 0.5
    z = (gradients.mean(0) - torch.cat([g.flatten() for g in wanted])) / error.clamp(min=1e-10)
    assert z.abs().max() < 4
    assert (error > 0).any()


@pytest.mark.parametrize("probe", ["latent", "data"])
def test_the_reported_value_is_the_entropy_where_all_directions_are_equal(probe: Any) -> None:
    for z_dim in (1, 2, 5):
        rows = torch.linalg.qr(torch.randn(8, z_dim)).Q.T
        encoder, decoder = nn.Linear(8, z_dim, bias=False), nn.Linear(z_dim, 8, bias=False)
        encoder.weight.data, decoder.weight.data = 0.5 * rows, 2 * rows.T
        q = JacobianNormal(
            encoder,
            decoder,
            torch.randn(4000, 8),
            torch.tensor(0.3).requires_grad_(),
            z_dim,
            probe=probe,
        )
        reported = q.score_parts(q.rsample()).log_prob
        wanted = -z_dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.15))
        error = reported.std().item() / 4000**0.5
        assert reported.mean().item() == pytest.approx(wanted, abs=4 * error)


def test_the_reported_value_flatters_the_posterior_elsewhere() -> None:
    q, *_ = made(torch.tensor(0.4))
    q = q.expand((2000, 4))
    reported = q.score_parts(q.rsample()).log_prob.detach()
    assert (reported.mean(0) < -q.entropy()[0]).all()


class TestScoreParts:
    @pytest.mark.parametrize("probe", ["latent", "data"])
    def test_only_the_tensor_that_was_drawn_meets_the_surrogate(self, probe: Any) -> None:
        q, *_ = made(torch.tensor(0.4), probe=probe)
        z = q.rsample()
        drawn, copied = q.score_parts(z), q.score_parts(z.clone())
        assert drawn.entropy_term is drawn.log_prob
        assert drawn.score_function == 0
        torch.testing.assert_close(copied.log_prob, q.log_prob(z))
        assert not torch.allclose(drawn.log_prob, copied.log_prob)
        q.rsample()
        torch.testing.assert_close(q.score_parts(z).log_prob, copied.log_prob)

    def test_without_gradients_there_is_no_surrogate(self) -> None:
        q, *_ = made(torch.tensor(0.4))
        with torch.no_grad():
            z = q.rsample()
        assert q.health is None
        torch.testing.assert_close(q.score_parts(z).log_prob, q.log_prob(z))

    def test_log_prob_is_exact_for_the_drawn_tensor_too(self) -> None:
        q, *_ = made(torch.tensor(0.4))
        z = q.rsample()
        assert torch.equal(q.log_prob(z), q.exact().log_prob(z))

    def test_masks_and_scales_of_pyro_keep_the_surrogate(self) -> None:
        q, *_ = made(torch.tensor(0.4))

        def program() -> None:
            with pyro.plate("data", 8, subsample_size=4, dim=-1), poutine.mask(mask=torch.arange(4) < 3):
                pyro.sample("z", q)

        trace = poutine.trace(program).get_trace()
        trace.compute_score_parts()
        site = trace.nodes["z"]
        raw = site["fn"].score_parts(site["value"]).entropy_term
        assert not torch.allclose(raw, q.log_prob(site["value"]))
        assert torch.equal(site["score_parts"].entropy_term, 2 * raw * (torch.arange(4) < 3))


def test_expand_shares_one_linearisation_and_its_probes() -> None:
    q, encoder, decoder, _ = made(torch.tensor(0.4))
    wide = q.expand((5, 4))
    encoder.calls = decoder.calls = 0
    z = wide.rsample((2,))
    # One pass without gradient for the point of the decoder's derivative, one for draws and probes together.
    assert (encoder.calls, decoder.calls) == (2, 1)
    assert z.shape == (2, 5, 4, Z_DIM)
    assert wide.score_parts(z).entropy_term.shape == (2, 5, 4)
    assert (encoder.calls, decoder.calls) == (2, 1)
    assert wide.health is not None
    assert wide.health.shape == (4,)
    assert not torch.allclose(z[0, 0], z[0, 1])
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z))
    assert type(wide) is JacobianNormal
    shared = made(torch.tensor(0.4), probe="data")
    shared[0].rsample()
    assert (shared[1].calls, shared[2].calls) == (1, 1)


def test_a_datum_of_its_own_and_a_batch_of_one_may_be_widened() -> None:
    encoder, decoder = networks()
    x = torch.randn(X_DIM)
    alone = JacobianNormal(encoder, decoder, x, torch.tensor(0.4), Z_DIM, data_dims=1)
    one = JacobianNormal(encoder, decoder, x.unsqueeze(0), torch.tensor(0.4), Z_DIM)
    assert alone.batch_shape == ()
    z = torch.randn(5, Z_DIM)
    wanted = alone.log_prob(z)
    assert wanted.shape == (5,)
    for wide in (alone.expand((5,)), one.expand((5,)), one.expand((5, 1)).expand((5, 5))):
        assert wide.rsample().shape == (*wide.batch_shape, Z_DIM)
        torch.testing.assert_close(wide.log_prob(z), wanted.expand(wide.batch_shape))


def test_images_and_channels() -> None:
    encoder = nn.Sequential(nn.Conv2d(2, 3, 3), nn.SiLU(), nn.Flatten(), nn.Linear(12, 2))
    decoder = nn.Sequential(nn.Linear(2, 32), nn.Unflatten(1, (2, 4, 4)))
    noise, x = torch.tensor([0.2, 0.5]).reshape(2, 1, 1), torch.randn(3, 2, 4, 4)
    q = JacobianNormal(encoder, decoder, x, noise, 2)
    assert q.expand((4, 3)).rsample().shape == (4, 3, 2)
    rows = jacobian(encoder, x[:1])[0, :, 0].flatten(1)
    scale = noise.expand(2, 4, 4).flatten()
    wanted = rows @ scale.square().diag() @ rows.T
    torch.testing.assert_close(q.exact().covariance_matrix[0], wanted)


def test_free_form_gives_the_location_and_the_volume() -> None:
    encoder, decoder = networks()
    x, noise = torch.randn(4, X_DIM), torch.tensor(0.4)
    for options in ({"logdet": "exact"}, {"num_probes": Z_DIM}, {"probe": "data"}):
        q: Any = FreeFormNormal(encoder, decoder, x, noise, Z_DIM, **options)
        wide = q.expand((2, 4))
        z = wide.rsample()
        assert type(wide) is FreeFormNormal
        assert torch.equal(z, encoder.net(x).expand(2, 4, Z_DIM))
        term = wide.score_parts(z).entropy_term
        assert term.shape == (2, 4)
        if options == {"logdet": "exact"}:
            wanted = Z_DIM * 0.5 * math.log(2 * math.pi) * 4 + half_log_det(encoder, x, noise)
            torch.testing.assert_close(-term[0].sum(), wanted)
        if options == {"num_probes": Z_DIM}:
            log = Z_DIM * (0.5 * math.log(2 * math.pi) + math.log(0.4)) * 4
            torch.testing.assert_close(-term[0].sum(), log + surrogate(encoder, decoder, x))
        with torch.no_grad():
            assert not torch.allclose(q.rsample(), encoder.net(x))
        normal = JacobianNormal(encoder, decoder, x, noise, Z_DIM)
        torch.testing.assert_close(q.log_prob(z[0]), normal.log_prob(z[0]))


def test_256_latents_fit() -> None:
    # 16 data times 256 rows are taken in two chunks.
    linear = torch.randn(256, 300).float()
    x, noise = torch.zeros(16, 300).float(), torch.tensor(0.1).float()
    encoder = nn.Linear(300, 256, bias=False).float()
    encoder.weight.data = linear
    q = JacobianNormal(encoder, nn.Identity(), x, noise, 256)
    exact = q.exact()
    assert exact.mean.dtype == torch.float32
    wanted = 0.01 * linear.double() @ linear.double().T
    ours = torch.linalg.cholesky(wanted).diagonal().log().sum().item()
    assert exact.scale_tril[3].double().diagonal().log().sum().item() == pytest.approx(ours, rel=1e-5)


def step(q: JacobianNormal) -> None:
    q.score_parts(q.rsample()).entropy_term.sum().backward()


def test_a_step_is_free_of_host_syncs() -> None:
    for options in ({}, {"probe": "data"}, {"num_probes": 2, "logdet": "pinv"}):
        q, *_ = made(torch.tensor(0.4), **options)
        assert host_syncs(partial(step, q)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logdet": "guess"}, "logdet must be 'surrogate', 'pinv' or 'exact', got 'guess'"),
        ({"probe": "both"}, "probe must be 'latent' or 'data', got 'both'"),
        ({"directions": "up"}, "directions must be 'sphere', 'rademacher' or 'gaussian', got 'up'"),
        ({"num_probes": 0}, "num_probes must be positive, got 0"),
        ({"num_probes": 4}, "num_probes must be at most z_dim = 3 for orthogonal directions, got 4"),
        ({"num_probes": 2, "probe": "data"}, "num_probes must be 1 with probe = 'data'.*got 2"),
        ({"logdet": "pinv", "probe": "data"}, "logdet must be 'surrogate' with probe = 'data', got 'pinv'"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(torch.tensor(0.4), **options)


def test_bad_sizes_and_noise() -> None:
    encoder, decoder = networks()
    with pytest.raises(ValueError, match=r"z_dim must be at most the 2 numbers of a datum.*got 3"):
        JacobianNormal(encoder, decoder, torch.zeros(4, 2), torch.tensor(0.1), 3)
    with pytest.raises(ValueError, match="Expected parameter noise"):
        made(torch.tensor(-0.1))
