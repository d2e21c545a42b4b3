"""The factor against hand computation: value, gradient, scale, and that it is nothing where it must be."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pvae.alignment import TRAINING_ONLY, LinearWarmup, align
from pvae.inference import ELBO, registered
from pvae.priors import GaussianMixture, StandardNormal
from pvae.testing import LinearGaussianVAE

from .programs import BATCH, Density, SubsampledGuide, SubsampledModel, arguments, data, density, programs

pytestmark = pytest.mark.usefixtures("float64")

INDEX = torch.tensor([3, 11, 0, 39, 25, 8, 17, 30])
STOCK = [
    Trace_ELBO(),
    Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    TraceEnum_ELBO(max_plate_nesting=1),
    RenyiELBO(alpha=0.3, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
]
OURS = [ELBO(), ELBO("elbo", 3), ELBO("mean_field"), ELBO("iwae", 3), ELBO("dreg", 3)]


def loss_and_gradients(
    objective: Any, pair: Any, args: tuple[Tensor, ...]
) -> tuple[float, list[Tensor | None]]:
    model, guide = pair
    bare = [getattr(program, "bare", program) for program in (model, guide)]
    parameters = [p for program in bare for p in program.parameters()]
    for parameter in parameters:
        parameter.grad = None
    pyro.clear_param_store()
    torch.manual_seed(2)
    loss = objective.loss_and_grads(registered(model, "model"), registered(guide, "guide"), *args)
    return loss, [None if p.grad is None else p.grad.clone() for p in parameters]


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """Huber's loss, written out."""
    size = np.abs(residual)
    return np.where(size <= delta, residual**2 / 2, delta * (size - delta / 2))


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("prior", ["normal", "gmm", "vamp"])
@pytest.mark.parametrize(
    ("objective", "estimator"),
    [
        (objective, estimator)
        for objective in [*STOCK, *OURS]
        for estimator in ("sample", "mean", "multi")
        # Refused, see test_combinations.
        if (getattr(objective, "kind", ""), estimator) != ("dreg", "sample")
    ],
    ids=lambda o: (
        o if isinstance(o, str) else f"{type(o).__name__} {getattr(o, 'kind', '')} {o.num_particles}"
    ),
)
def test_without_weight_it_changes_no_bit(objective: Any, prior: str, estimator: Any) -> None:
    wanted = loss_and_gradients(objective, programs(prior), arguments(programs(prior)[0], INDEX))
    for gamma, start in ((0.0, 5), (LinearWarmup(0.5), 0)):
        aligned = align(*programs(prior), density(), estimator=estimator, gamma=gamma)
        args = arguments(aligned.model, INDEX)
        aligned.model.on_step(args, INDEX, start, 10)
        ours = loss_and_gradients(objective, aligned, args)
        assert ours[0] == wanted[0]
        for a, b in zip(ours[1], wanted[1], strict=True):
            assert (a is None) == (b is None)
            assert a is None or (b is not None and torch.equal(a, b))
        assert any(gradient is not None for gradient in ours[1])


@pytest.mark.parametrize("delta", [1.0, 0.3, math.inf])
@pytest.mark.parametrize("weight", ["precision", "inverse", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("subsampled", [False, True])
def test_loss_and_gradient_are_those_of_the_sum_written_out(
    delta: float, weight: Any, normalize: bool, subsampled: bool
) -> None:
    gamma, offset, floor, rho = 0.7, -1.3, 0.25, density()
    prior = GaussianMixture(2, 3)
    if subsampled:
        pair: Any = (SubsampledModel(prior), SubsampledGuide())
        args: tuple[Tensor, ...] = (data()[INDEX], INDEX)
        share = len(rho.log_density) / BATCH
    else:
        pair, share = programs("gmm"), 1.0
        prior = pair[0].prior
        args = (data()[INDEX],)
    aligned = align(
        pair[0],
        pair[1],
        rho,
        gamma=gamma,
        offset=offset,
        floor=floor,
        delta=delta,
        weight=weight,
        normalize=normalize,
    )
    if not subsampled:
        aligned.model.on_batch(INDEX)
    plain, before = loss_and_gradients(Trace_ELBO(), pair, args)
    ours, after = loss_and_gradients(Trace_ELBO(), aligned, args)

    sigma = rho.standard_error.numpy()
    w = {
        "precision": 1 / (sigma**2 + floor**2),
        "inverse": 1 / np.maximum(np.sqrt(sigma**2 + floor**2), 1e-3),
        "none": np.ones_like(sigma),
    }[weight]
    w = w / w.mean() if normalize else w
    torch.manual_seed(2)
    trace = poutine.trace(pair[1]).get_trace(*args)
    s = prior().log_prob(trace.nodes["z"]["value"])
    residual = s - (rho.log_density[INDEX] - offset)
    wanted = gamma * share * (w[INDEX.numpy()] * huber(residual.detach().numpy(), delta)).sum()
    assert ours - plain == pytest.approx(wanted, rel=1e-11)

    slope = residual.clamp(-delta, delta).detach() * torch.from_numpy(w)[INDEX]
    parameters = [p for program in pair for p in program.parameters()]
    by_hand = torch.autograd.grad((gamma * share * slope * s).sum(), parameters, allow_unused=True)
    for a, b, extra in zip(after, before, by_hand, strict=True):
        assert a is not None
        assert b is not None
        wanted_gradient = b if extra is None else b + extra
        torch.testing.assert_close(a, wanted_gradient, rtol=1e-11, atol=1e-11)


def align_loss(aligned: Any, args: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(4)
    return ELBO().terms(*aligned, *args).parts["align"]


@pytest.mark.parametrize("estimator", ["sample", "mean"])
@pytest.mark.parametrize("reduction", ["mean", "rms"])
def test_gradients_of_prior_and_encoder_are_those_of_finite_differences(
    estimator: Any, reduction: Any
) -> None:
    model, guide = programs("gmm")
    aligned = align(model, guide, density(), estimator=estimator, reduction=reduction, gamma=1.0)
    args = arguments(model, INDEX)
    aligned.model.on_batch(INDEX)
    prior: Any = model.prior
    encoder: Any = guide.encoder
    parameters = [prior.logits, prior.loc, prior.raw_scale, *encoder.parameters()]
    gradients = torch.autograd.grad(align_loss(aligned, args), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.abs().max() > 1e-6
        for i in torch.randperm(parameter.numel())[:4].tolist():
            flat, step = parameter.data.view(-1), 1e-6
            around = []
            for shift in (step, -step):
                flat[i] += shift
                around.append(align_loss(aligned, args).item())
                flat[i] -= shift
            numeric = (around[0] - around[1]) / (2 * step)
            assert gradient.view(-1)[i].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("prior", ["gmm", "flow", "diag"])
@pytest.mark.parametrize("estimator", ["sample", "mean", "multi"])
def test_detach_takes_the_gradient_of_one_side_and_leaves_value_and_the_other(
    prior: str, estimator: Any
) -> None:
    found: dict[Any, Any] = {}
    for detach in (None, "prior", "guide"):
        model, guide = programs(prior)
        aligned = align(model, guide, density(), estimator=estimator, gamma=1.0, detach=detach)
        args = arguments(model, INDEX)
        aligned.model.on_batch(INDEX)
        loss = align_loss(aligned, args)
        theirs = [p for p in model.prior.parameters() if p.requires_grad]  # type: ignore[union-attr]
        mine = list(guide.parameters())
        if not loss.requires_grad:
            found[detach] = (loss.detach(), [], [])
            continue
        gradients = torch.autograd.grad(loss, [*theirs, *mine], allow_unused=True)
        found[detach] = (loss.detach(), gradients[: len(theirs)], gradients[len(theirs) :])
    value, to_prior, to_guide = found[None]
    for detach in ("prior", "guide"):
        torch.testing.assert_close(found[detach][0], value, rtol=1e-12, atol=1e-12)
    assert all(g is None or (g == 0).all() for g in found["prior"][1])
    assert all(g is None or (g == 0).all() for g in found["guide"][2])
    for ours, wanted in ((found["prior"][2], to_guide), (found["guide"][1], to_prior)):
        for a, b in zip(ours, wanted, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any(g is not None and g.abs().max() > 0 for g in to_guide)


def test_the_released_reduction_is_the_root_of_the_batch_mean() -> None:
    rho = density()
    for reduction in ("mean", "rms"):
        aligned = align(*programs("gmm"), rho, reduction=reduction, gamma=0.6)
        args = arguments(aligned.model, INDEX)
        aligned.model.on_batch(INDEX)
        loss = align_loss(aligned, args)
        gradient = torch.autograd.grad(loss, list(aligned.bare[0].prior.parameters()))  # type: ignore[union-attr]
        if reduction == "mean":
            mean, of_mean = loss.detach() / 0.6, gradient
    torch.testing.assert_close(loss.detach(), 0.6 * mean.sqrt())
    for ours, slope in zip(gradient, of_mean, strict=True):
        torch.testing.assert_close(ours, slope / (2 * mean.sqrt()), rtol=1e-6, atol=1e-9)


def test_a_draw_pays_half_the_weighted_variance_more_than_the_mean() -> None:
    rho, (model, guide) = density(), programs("normal")
    losses: dict[str, Tensor] = {}
    x = data()[INDEX]
    for estimator in ("sample", "mean"):
        aligned = align(model, guide, rho, estimator=estimator, gamma=1.0, delta=math.inf)
        aligned.model.on_batch(INDEX)
        torch.manual_seed(0)
        losses[estimator] = ELBO("elbo", 20_000).terms(*aligned, x).parts["align"].detach()
    loc, scale = guide.encoder(x)  # type: ignore[operator]
    variance = (loc**2 * scale**2 + scale**4 / 2).sum(-1)
    gap = (aligned.aligner.target.weight[INDEX] * variance).mean().item() / 2
    assert float(losses["sample"] - losses["mean"]) == pytest.approx(gap, rel=0.02)


def test_its_scale_is_that_of_a_subsample() -> None:
    pair = SubsampledModel(StandardNormal(2)), SubsampledGuide()
    aligned = align(*pair, density(), gamma=1.0)
    trace = poutine.trace(aligned.model).get_trace(data()[INDEX], INDEX)
    site = trace.nodes["z_align"]
    assert site["scale"] == pytest.approx(len(aligned.aligner.target) / BATCH)
    assert site["scale"] == trace.nodes["z"]["scale"]
    assert site["infer"][TRAINING_ONLY] == "draw"
    whole = align(*programs(), density(), gamma=1.0)
    whole.model.on_batch(INDEX)
    assert poutine.trace(whole.model).get_trace(data()[INDEX]).nodes["z_align"]["scale"] == 1


class ScaleOne(Messenger):
    """Weighs one site."""

    def __init__(self, site: str, scale: float) -> None:
        super().__init__()
        self.site, self.scale = site, scale

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site:
            msg["scale"] = msg["scale"] * self.scale


class Weighed(nn.Module):
    """A model with a messenger around its latent, inside or outside of the plate."""

    def __init__(self, around: Any, inside: bool) -> None:
        super().__init__()
        self.prior, self.around, self.inside = StandardNormal(2), around, inside
        self.decoder = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> None:
        plate = pyro.plate("data", len(x), dim=-1)
        first, second = (plate, self.around()) if self.inside else (self.around(), plate)
        with first, second:
            z = pyro.sample("z", self.prior())
        with plate:
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("inside", [False, True])
def test_the_warm_up_of_the_kl_is_not_its_own(inside: bool) -> None:
    _, guide = programs()
    x = data()[INDEX]

    def factor(model: nn.Module) -> float:
        aligned = align(model, guide, density(), gamma=1.0, offset=0.0)
        aligned.model.on_batch(INDEX)
        torch.manual_seed(0)
        terms = ELBO().terms(*aligned, x, beta=0.25)
        parts = terms.parts
        wanted = parts["reconstruction"] + 0.25 * parts["kl"] + parts["align"]
        torch.testing.assert_close(terms.loss, wanted)
        return terms.parts["align"].item()

    plain = factor(Weighed(lambda: ScaleOne("nothing", 0.25), inside))
    assert factor(Weighed(lambda: ScaleOne("z", 0.25), inside)) == plain
    for scale in (0.25, torch.tensor(0.25)):
        with pytest.raises(ValueError, match=r"from a poutine\.scale around the site: weigh the KL by"):
            factor(Weighed(lambda scale=scale: poutine.scale(scale=scale), inside))


def test_a_scale_or_a_mask_around_the_whole_program_weighs_it_like_everything() -> None:
    aligned = align(*programs(), density(), gamma=1.0)
    aligned.model.on_batch(INDEX)
    mask = torch.arange(BATCH) < 3
    program = poutine.scale(poutine.mask(aligned.model, mask=mask), scale=0.5)
    trace = poutine.trace(program).get_trace(data()[INDEX])
    trace.compute_log_prob()
    site = trace.nodes["z_align"]
    assert (site["log_prob"][3:] == 0).all()
    torch.testing.assert_close(site["log_prob"], 0.5 * site["fn"].log_factor * mask)


@pytest.mark.parametrize("estimator", ["mean", "multi"])
def test_its_expectation_is_the_same_for_every_particle(estimator: Any) -> None:
    aligned = align(*programs("gmm"), density(), estimator=estimator, gamma=1.0)
    aligned.model.on_batch(INDEX)
    x = data()[INDEX]
    with pyro.plate("particles", 4, dim=-2):
        guide = poutine.trace(aligned.guide).get_trace(x)
        model = poutine.trace(poutine.replay(aligned.model, guide)).get_trace(x)
    factor = model.nodes["z_align"]["fn"].log_factor
    assert factor.shape == (4, BATCH)
    assert (factor == factor[0]).all()
    assert len(factor[0].unique()) == BATCH


@pytest.mark.filterwarnings("ignore:.* of the targets lie above")
def test_it_leaves_the_optimum_of_a_linear_model_as_the_noise_vanishes() -> None:
    # Data without noise from a linear decoder: the codes are the whitened data, whose density is the prior's.
    codes = torch.randn(200, 2)
    rho = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1).log_prob(codes)
    pulls: dict[float, list[float]] = {0.0: [], 1.0: []}
    for shift, norms in pulls.items():
        for noise in (0.1, 0.01, 0.001):
            oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=noise, seed=1)
            target = Density(rho + shift, torch.full((200,), 0.1))
            aligned = align(
                oracle.model, oracle.exact_guide, target, estimator="mean", offset="none", gamma=1.0
            )
            x = (codes @ oracle.model.weight.T + oracle.model.bias).detach()
            terms = ELBO().terms(*aligned, x)
            parameters = list(oracle.exact_guide.parameters())
            gradients = torch.autograd.grad(terms.parts["align"], parameters)
            norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    # The residual is of the order of the posterior's variance; in other units, of the order of their shift.
    for near, far in zip(pulls[0.0][1:], pulls[0.0], strict=False):
        assert near < 0.02 * far
    assert min(pulls[1.0]) > 100 * pulls[0.0][1]
