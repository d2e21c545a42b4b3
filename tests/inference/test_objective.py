"""The objective against Pyro's own and against formulas written out by hand."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pvae.distributions import AnalyticEntropyNormal
from pvae.inference import ELBO, registered

from .profiled import profiled_programs
from .programs import LinearGuide, LinearModel, parameters

pytestmark = pytest.mark.usefixtures("float64")


def value_and_gradients(loss: Tensor, programs: tuple[nn.Module, nn.Module]) -> tuple[Tensor, list[Tensor]]:
    gradients = torch.autograd.grad(loss, parameters(*programs), allow_unused=True)
    return loss.detach(), [g for g in gradients if g is not None]


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("ladder", [False, True])
@pytest.mark.parametrize("factor", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "reference"), [("elbo", Trace_ELBO), ("mean_field", TraceMeanField_ELBO)])
def test_equals_pyro_in_value_and_gradient(
    kind: Any, reference: Any, num_particles: int, ladder: bool, factor: float
) -> None:
    programs = LinearModel(ladder=ladder, factor=factor), LinearGuide(ladder=ladder)
    x = torch.randn(7, 5)
    pyros = reference(num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
    torch.manual_seed(1)
    wanted = value_and_gradients(pyros.differentiable_loss(*programs, x), programs)
    torch.manual_seed(1)
    ours = value_and_gradients(ELBO(kind, num_particles).differentiable_loss(*programs, x), programs)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_honours_poutine_scale_and_mask_as_pyro_does(scale: float) -> None:
    model, guide = LinearModel(), LinearGuide()
    mask = torch.tensor([True, False, True, True, False, True, True])

    def weighted(program: nn.Module) -> Any:
        return pyro.poutine.mask(pyro.poutine.scale(program, scale), mask)

    x = torch.randn(7, 5)
    torch.manual_seed(1)
    wanted = Trace_ELBO().differentiable_loss(weighted(model), weighted(guide), x)
    torch.manual_seed(1)
    ours = ELBO().differentiable_loss(weighted(model), weighted(guide), x)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_iwae_equals_pyros_renyi_elbo() -> None:
    programs, x = (LinearModel(), LinearGuide()), torch.randn(7, 5)
    reference = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(1)
    wanted = reference.loss(*programs, x)
    torch.manual_seed(1)
    assert ELBO("iwae", 5).loss(*programs, x) == pytest.approx(wanted, abs=1e-10)


def test_iwae_gradient_is_that_of_the_bound_written_out() -> None:
    model, guide = LinearModel(), LinearGuide()
    x = torch.randn(7, 5)
    torch.manual_seed(1)
    loss = ELBO("iwae", 6).differentiable_loss(model, guide, x)
    ours = value_and_gradients(loss, (model, guide))
    torch.manual_seed(1)
    log_w = by_hand(model, guide, x, torch.normal(torch.zeros(6, 7, 3), torch.ones(6, 7, 3)))
    wanted = value_and_gradients(-(log_w.logsumexp(0) - math.log(6)).sum(), (model, guide))
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


def by_hand(model: LinearModel, guide: LinearGuide, x: Tensor, noise: Tensor, hold: bool = False) -> Tensor:
    """Log-weights of the one-level linear programs, shape (K, B), without Pyro."""
    loc, log_scale = guide.encoder(x).chunk(2, -1)
    z = loc + log_scale.exp() * noise
    if hold:
        loc, log_scale = loc.detach(), log_scale.detach()
    normal = torch.distributions.Normal
    log_q = normal(loc, log_scale.exp()).log_prob(z).sum(-1)
    log_p = normal(torch.zeros(3), torch.ones(3)).log_prob(z).sum(-1)
    return normal(model.decoder(z), torch.ones(5)).log_prob(x).sum(-1) + log_p - log_q


def test_dreg_gradient_is_the_doubly_reparameterised_one() -> None:
    model, guide = LinearModel(), LinearGuide()
    x = torch.randn(7, 5)
    torch.manual_seed(1)
    ELBO("dreg", 6).loss_and_grads(model, guide, x)
    ours = [p.grad for p in (*guide.encoder.parameters(), *model.decoder.parameters())]
    torch.manual_seed(1)
    log_w = by_hand(model, guide, x, torch.normal(torch.zeros(6, 7, 3), torch.ones(6, 7, 3)), hold=True)
    weight = log_w.detach().softmax(0)
    on_path = torch.autograd.grad(
        -(weight.square() * log_w).sum(), list(guide.encoder.parameters()), retain_graph=True
    )
    on_model = torch.autograd.grad(-(weight * log_w).sum(), list(model.decoder.parameters()))
    torch.testing.assert_close(ours, [*on_path, *on_model], rtol=1e-10, atol=1e-10)


def test_dreg_and_iwae_agree_in_value_and_in_expected_gradient_on_a_ladder() -> None:
    programs = LinearModel(ladder=True), LinearGuide(ladder=True)
    x = torch.randn(4000, 5)[:1].expand(4000, 5)  # many independent draws for one datum
    gradients = {}
    for kind in ("iwae", "dreg"):
        torch.manual_seed(3)
        loss = ELBO(kind, 4).terms(*programs, x).loss
        gradients[kind] = torch.autograd.grad(loss, list(programs[1].parameters()))
    flat = {kind: torch.cat([g.flatten() for g in grads]) for kind, grads in gradients.items()}
    assert (flat["iwae"] - flat["dreg"]).norm() < 0.1 * flat["iwae"].norm()
    assert not torch.equal(flat["iwae"], flat["dreg"])


def test_beta_weighs_the_latent_sites_alone() -> None:
    programs, x = (LinearModel(factor=0.2), LinearGuide()), torch.randn(7, 5)
    torch.manual_seed(1)
    full = ELBO("mean_field").terms(*programs, x)
    torch.manual_seed(1)
    half = ELBO("mean_field").terms(*programs, x, beta=0.5)
    parts = full.parts
    torch.testing.assert_close(half.parts, parts)
    torch.testing.assert_close(full.bound, half.bound)
    torch.testing.assert_close(
        half.loss, parts["reconstruction"] + 0.5 * parts["kl"] - parts["factor/alignment"]
    )
    torch.testing.assert_close(full.bound.mean(), -(parts["reconstruction"] + parts["kl"]))


def test_free_bits_leave_small_kl_without_gradient() -> None:
    programs, x = (LinearModel(), LinearGuide()), torch.randn(7, 5)
    terms = ELBO("mean_field", free_bits=1e3).terms(*programs, x)
    torch.testing.assert_close(terms.loss, terms.parts["reconstruction"] + 1e3)
    terms = ELBO("mean_field", free_bits=1e-6).terms(*programs, x)
    torch.testing.assert_close(terms.loss, terms.parts["reconstruction"] + terms.parts["kl"])


@pytest.mark.parametrize("kind", ["elbo", "mean_field", "iwae", "dreg"])
def test_stock_svi_trains_registered_programs(kind: Any) -> None:
    model, guide, x = LinearModel(), LinearGuide(), torch.randn(50, 5)
    before = [p.detach().clone() for p in (model.decoder.weight, guide.encoder.weight)]
    svi = SVI(
        registered(model, "model"),
        registered(guide, "guide"),
        pyro.optim.Adam({"lr": 0.01}),
        loss=ELBO(kind, 2),
    )
    losses = [svi.step(x) for _ in range(100)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not torch.equal(before[0], model.decoder.weight)
    assert not torch.equal(before[1], guide.encoder.weight)


def test_a_non_reparameterised_latent_is_refused() -> None:
    class Discrete(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with pyro.plate("data", len(x), dim=-1):
                return pyro.sample("z", dist.Poisson(x.new_ones(3)).to_event(1))

    with pytest.raises(ValueError, match=r"guide site 'z' must have a reparameterised sample, got"):
        ELBO().loss(LinearModel(), Discrete(), torch.randn(4, 5))


def test_a_site_outside_the_plate_is_refused() -> None:
    class Outside(LinearModel):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            pyro.factor("f", x.new_zeros(()))
            return super().forward(x)

    with pytest.raises(ValueError, match=r"model site 'f' must lie in the plate over the data"):
        ELBO().loss(Outside(), LinearGuide(), torch.randn(4, 5))


def test_a_latent_that_the_guide_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the guide must sample every latent site of the model, 'z_2'"):
        ELBO().loss(LinearModel(ladder=True), LinearGuide(), torch.randn(4, 5))


def test_a_latent_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model must have every latent site of the guide, 'z_2'"):
        ELBO().loss(LinearModel(), Both(), torch.randn(4, 5))


class Both(LinearGuide):
    """Draws z and a latent that the model does not know."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("more", len(x), dim=-1):
            pyro.sample("z_2", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        return super().forward(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "vae"}, "objective must be one of"),
        ({"num_particles": 0}, "num_particles must be positive, got 0"),
        ({"free_bits": -1.0}, "free_bits must not be negative"),
        ({"kind": "iwae", "free_bits": 1.0}, "free_bits needs a KL term"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ELBO(**arguments)


class CountSyncs(TorchDispatchMode):
    """Counts the operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["elbo", "mean_field", "iwae", "dreg"])
def test_a_step_never_waits_for_the_device(kind: Any) -> None:
    programs, x = (LinearModel(factor=0.1), LinearGuide()), torch.randn(7, 5)
    with pyro.validation_enabled(False), CountSyncs() as syncs:
        ELBO(kind, 3).terms(*programs, x, beta=torch.tensor(0.5)).loss.backward()
    assert syncs.count == 0
    with CountSyncs() as syncs:
        torch.ones(()).item()
    assert syncs.count == 1


class Surrogate(dist.Normal):
    """A Normal whose entropy carries the gradient of twice itself."""

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts = super().score_parts(x)
        return parts._replace(entropy_term=2 * parts.log_prob)


def test_a_declared_surrogate_gives_the_gradient_and_the_density_the_value() -> None:
    loc = nn.Parameter(torch.zeros(4))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(scale: Tensor, family: Any) -> Any:
        def program(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", family(loc, scale))

        return program

    x, results = torch.randn(4), []
    for family in (dist.Normal, Surrogate):
        scale = torch.ones(4, requires_grad=True)
        torch.manual_seed(0)
        loss = ELBO().terms(model, guide(scale, family), x).loss
        results.append((loss.detach(), torch.autograd.grad(loss, scale)[0]))
    torch.testing.assert_close(results[0][0], results[1][0])
    # d log q(z(scale)) / d scale = -1 / scale along the path, once more than before, in a mean over 4.
    torch.testing.assert_close(results[1][1], results[0][1] - 1 / 4)


class AnalyticGuide(LinearGuide):
    """The linear guide, by its entropy in closed form."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            return pyro.sample("z", self.family(loc, log_scale.exp()))

    def family(self, loc: Tensor, scale: Tensor) -> Any:
        return AnalyticEntropyNormal(loc, scale)


class MaskedAnalyticGuide(AnalyticGuide):
    def family(self, loc: Tensor, scale: Tensor) -> Any:
        return AnalyticEntropyNormal(loc, scale).mask(torch.ones(loc.shape[:-1], dtype=torch.bool))


def test_both_entropies_estimate_the_same_kl_which_is_not_negative() -> None:
    model, sampled, analytic = LinearModel(), LinearGuide(), AnalyticGuide()
    analytic.load_state_dict(sampled.state_dict())
    x = torch.randn(6, 5)
    torch.manual_seed(1)
    ours = ELBO(num_particles=20_000).terms(model, analytic, x)
    torch.manual_seed(2)
    theirs = ELBO(num_particles=20_000).terms(model, sampled, x)
    exact = ELBO("mean_field").terms(model, sampled, x).ratios[0]
    for terms in (ours, theirs):
        ratio = terms.ratios[0]
        assert ratio.shape == (20_000, 6)
        assert ((ratio.mean(0) - exact).abs() <= 4 * ratio.std(0) / 20_000**0.5).all()
        assert (ratio.mean(0) >= 0).all()
    # They are two estimators: for the same draw the figures differ.
    spread = (ours.ratios[0].std(0) / theirs.ratios[0].std(0)).detach()
    assert ((spread - 1).abs() > 0.01).all()


def test_the_sampled_entropy_is_exact_at_the_prior_and_the_analytic_one_is_not() -> None:
    x, model = torch.randn(4, 5), LinearModel()
    for guide in (LinearGuide(), AnalyticGuide()):
        nn.init.zeros_(guide.encoder.weight)
        nn.init.zeros_(guide.encoder.bias)
        spread = ELBO(num_particles=500).terms(model, guide, x).ratios[0].std(0)
        wanted = math.sqrt(3 / 2) if isinstance(guide, AnalyticGuide) else 0.0
        # 1/2 sum_j (z_j^2 - 1) has the variance 3/2.
        torch.testing.assert_close(spread, torch.full((4,), wanted), rtol=0.15, atol=1e-12)


@pytest.mark.parametrize("family", [AnalyticGuide, MaskedAnalyticGuide])
def test_both_entropies_have_one_gradient(family: Any) -> None:
    model, sampled, analytic = LinearModel(), LinearGuide(), family()
    analytic.load_state_dict(sampled.state_dict())
    x, results = torch.randn(6, 5), []
    for guide in (sampled, analytic):
        torch.manual_seed(1)
        loss = ELBO(num_particles=3).terms(model, guide, x).loss
        results.append(value_and_gradients(loss, (model, guide)))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(results[0][0], results[1][0])


def test_a_closed_form_kl_is_found_for_the_analytic_normal() -> None:
    model, sampled, analytic = LinearModel(), LinearGuide(), AnalyticGuide()
    analytic.load_state_dict(sampled.state_dict())
    x = torch.randn(6, 5)
    ratios = [ELBO("mean_field").terms(model, guide, x).ratios[0] for guide in (sampled, analytic)]
    assert torch.equal(*ratios)


@pytest.mark.parametrize("kind", ["iwae", "dreg"])
@pytest.mark.parametrize("family", [AnalyticGuide, MaskedAnalyticGuide])
@pytest.mark.parametrize("num_particles", [1, 4])
def test_a_mean_of_log_q_is_refused_inside_the_logarithm(kind: Any, family: Any, num_particles: int) -> None:
    message = f"objective '{kind}' needs log q\\(z\\) at the draw, but guide site 'z' has an analytic entropy"
    with pytest.raises(ValueError, match=message):
        ELBO(kind, num_particles).terms(LinearModel(), family(), torch.randn(4, 5))


@pytest.mark.parametrize("reference", [Trace_ELBO, TraceMeanField_ELBO])
def test_stock_elbos_take_the_analytic_normal(reference: Any) -> None:
    model, analytic, sampled = LinearModel(), AnalyticGuide(), LinearGuide()
    analytic.load_state_dict(sampled.state_dict())
    x, results = torch.randn(6, 5), []
    for guide in (sampled, analytic):
        torch.manual_seed(1)
        loss = reference().differentiable_loss(model, guide, x)
        results.append(torch.autograd.grad(loss, [*guide.encoder.parameters(), *model.decoder.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["elbo", "mean_field"])
def test_beta_two_doubles_the_kl_part_of_a_fitted_sigma(kind: Any) -> None:
    model, guide = profiled_programs()
    x, terms = torch.randn(7, 5), []
    for beta in (1.0, 2.0):
        torch.manual_seed(1)
        terms.append(ELBO(kind, 3).terms(model, guide, x, beta=beta))
    single, double = terms
    torch.testing.assert_close(double.parts, single.parts)
    torch.testing.assert_close(single.loss, single.parts["reconstruction"] + single.parts["kl"])
    torch.testing.assert_close(double.loss, single.parts["reconstruction"] + 2 * single.parts["kl"])
    # 5 entries at their own optimum.
    optimum = 2.5 * (2 * math.pi * math.e * model.likelihood.sigma.square()).log()
    torch.testing.assert_close(single.parts["reconstruction"], optimum)


def test_a_step_with_a_fitted_sigma_never_waits_for_the_device() -> None:
    (model, guide), x = profiled_programs(channels=5), torch.randn(7, 5)
    with pyro.validation_enabled(False), CountSyncs() as syncs:
        ELBO("elbo", 3).terms(model, guide, x, beta=torch.tensor(0.5)).loss.backward()
    assert syncs.count == 0
