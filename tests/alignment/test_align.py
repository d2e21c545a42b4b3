"""Settings: what they come to, what is refused and in which words, and the report before training."""

import copy
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pvae.alignment import Aligned, LinearWarmup, Target, align
from pvae.density import DensityTarget
from pvae.guides import NormalGuide, PointGuide
from pvae.inference import ELBO
from pvae.likelihoods import Normal
from pvae.models import XVAE, Autoencoder
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import CodePrior, CodeStats

from .programs import (
    BATCH,
    NUM_DATA,
    X_DIM,
    Z_DIM,
    Density,
    SubsampledGuide,
    SubsampledModel,
    arguments,
    data,
    density,
    programs,
)

pytestmark = pytest.mark.usefixtures("float64")

INDEX = torch.arange(BATCH) + 2


def made(prior: str = "normal", rho: Any = None, **settings: Any) -> Aligned:
    return align(*programs(prior), density() if rho is None else rho, **settings)


def figures(aligned: Aligned) -> dict[str, Any]:
    aligner = aligned.aligner
    return {
        "estimator": aligner.estimator,
        "reduction": aligner.reduction,
        "mean weight": aligner.target.weight.mean().item(),
        "offset": aligner.offset.item(),
    }


def test_presets_are_the_paper_and_its_code() -> None:
    rho = density()
    sigma = rho.standard_error
    matched = rho.log_density.mean().item() + 1 + math.log(2 * math.pi)
    ours, paper, released = (figures(made(preset=p)) for p in (None, "paper", "released"))
    assert ours == pytest.approx(
        {"estimator": "sample", "reduction": "mean", "mean weight": 1, "offset": matched}
    )
    wanted = {"estimator": "mean", "reduction": "mean", "mean weight": (sigma**-2).mean().item(), "offset": 0}
    assert paper == pytest.approx(wanted)
    wanted = {
        "estimator": "sample",
        "reduction": "rms",
        "mean weight": (1 / sigma).mean().item(),
        "offset": 0,
    }
    assert released == pytest.approx(wanted)
    mixed = figures(made(preset="paper", estimator="multi", normalize=True))
    assert mixed == pytest.approx(paper | {"estimator": "multi", "mean weight": 1})


def test_the_released_flow_leaves_units_out() -> None:
    rho = density()
    gap = made(rho=rho, kind="flow").targets() - made(rho=rho, kind="flow", preset="released").targets()
    wanted = rho.embedding.std(0, correction=0).log().sum()
    torch.testing.assert_close(gap, wanted.expand(NUM_DATA))


@pytest.mark.parametrize(
    ("prior", "way"),
    [
        ("normal", "entropy"),
        ("diag", "entropy"),
        ("full", "entropy"),
        ("kde", "entropy"),
        ("marginal", "entropy"),
    ]
    + [(prior, "none") for prior in ("gmm", "vamp", "flow", "zuko")],
)
def test_a_fixed_prior_is_matched_and_one_with_parameters_left_free(prior: str, way: str) -> None:
    aligned, named = made(prior), made(prior, offset=way if way == "none" else "entropy")
    assert torch.equal(aligned.aligner.offset, named.aligner.offset)
    assert (aligned.aligner.offset == 0) == (way == "none")
    if way == "entropy":
        model: Any = aligned.bare[0]
        drawn = model.prior().log_prob(model.prior().sample((50_000,)))
        gap = aligned.targets().mean() - drawn.mean()
        # The offset itself is made of 10,000 draws where there is no closed form.
        assert abs(gap) < 4.5 * drawn.std() * (1 / 50_000 + 1 / 10_000) ** 0.5


def test_the_offset_of_a_normal_is_exact_and_takes_no_random_number() -> None:
    pair, before = programs("full"), torch.get_rng_state()
    aligned = align(*pair, density())
    assert torch.equal(torch.get_rng_state(), before)
    model: Any = aligned.bare[0]
    wanted = density().log_density.mean() + model.prior().entropy()
    torch.testing.assert_close(aligned.aligner.offset, wanted)


def test_a_learned_offset_starts_at_the_matched_one_and_moves_tenfold() -> None:
    aligned, matched = made(offset="learn", gamma=1.0), made(offset="entropy", gamma=1.0)
    assert torch.equal(aligned.aligner.offset, matched.aligner.offset)
    aligned.model.on_batch(INDEX)
    optimizer = torch.optim.Adam(aligned.model.parameters(), lr=1e-3)
    ELBO().terms(*aligned, data()[INDEX]).loss.backward()
    optimizer.step()
    moved = aligned.aligner.offset.detach() - matched.aligner.offset
    assert abs(moved).item() == pytest.approx(1e-2, rel=1e-4)
    # Uphill in the targets where the draws lie above them: the gradient of the mean Huber loss.
    aligned.aligner.zero_grad()
    torch.manual_seed(1)
    ELBO().terms(*aligned, data()[INDEX]).loss.backward()
    torch.manual_seed(1)
    trace = poutine.trace(aligned.bare[1]).get_trace(data()[INDEX])
    model: Any = aligned.bare[0]
    residual = model.prior().log_prob(trace.nodes["z"]["value"]) - aligned.targets()[INDEX]
    slope = (aligned.aligner.target.weight[INDEX] * residual.clamp(-1, 1)).mean()
    raw: Any = aligned.aligner.raw_offset
    torch.testing.assert_close(raw.grad, 10 * slope.detach())


def test_weights() -> None:
    rho, sigma = density(), density().standard_error
    assert torch.equal(Target(rho, "none").weight, torch.ones(NUM_DATA))
    torch.testing.assert_close(Target(rho, normalize=False, floor=0.5).weight, 1 / (sigma**2 + 0.25))
    rho.standard_error = torch.full((NUM_DATA,), 1e-9)
    torch.testing.assert_close(Target(rho, "inverse", normalize=False).weight, torch.full((NUM_DATA,), 1e3))
    rho.standard_error = sigma
    clipped = Target(rho, clip=0.9, normalize=False).weight
    assert clipped.max() == (sigma**-2).sort().values[round(0.9 * (NUM_DATA - 1))]
    assert (clipped == (sigma**-2)).sum() >= 0.9 * NUM_DATA - 1
    assert Target(rho).weight.mean().item() == pytest.approx(1)


def test_numpy_and_density_targets_are_taken_too() -> None:
    rho = density()
    arrays = Density(rho.log_density.numpy(), rho.standard_error.numpy(), rho.embedding.numpy())
    known = DensityTarget.known(rho.log_density, rho.standard_error, rho.embedding)
    for kind in ("direct", "flow"):
        wanted = made(rho=rho, kind=kind, offset="none").aligner.target
        for other in (arrays, known):
            ours = made(rho=other, kind=kind, offset="none").aligner.target
            assert torch.equal(ours.log_density, wanted.log_density)
            assert torch.equal(ours.weight, wanted.weight)


def test_tables_take_the_precision_of_the_programs() -> None:
    model, guide = (program.float() for program in programs("gmm"))
    aligned = align(model, guide, density())
    dtypes = {t.dtype for t in aligned.aligner.buffers() if t.is_floating_point()}
    assert dtypes == {torch.float32}
    aligned.model.double()
    assert aligned.aligner.gamma.dtype == torch.float64


def test_rows_come_from_the_index_else_from_a_plate_of_all_data() -> None:
    pair = SubsampledModel(programs()[0].prior), SubsampledGuide()  # type: ignore[arg-type]
    aligned = align(*pair, density(), gamma=1.0)

    def targets_used(*args: Any) -> Tensor:
        trace = poutine.trace(aligned.model).get_trace(*args)
        s = pair[0].prior().log_prob(trace.nodes["z"]["value"])
        return s, trace.nodes["z_align"]["fn"].log_factor  # type: ignore[return-value]

    for told in (None, INDEX.flip(0)):
        if told is not None:
            aligned.model.on_batch(told)
        rows = INDEX if told is None else told
        s, factor = targets_used(data()[INDEX], INDEX)
        residual = s - aligned.targets()[rows]
        huber = torch.where(residual.abs() < 1, residual**2 / 2, residual.abs() - 0.5)
        torch.testing.assert_close(factor, -aligned.aligner.target.weight[rows] * huber)
    # All data in a plate without a subsample, in their order.
    whole = made(gamma=1.0)
    trace = poutine.trace(whole.model).get_trace(data())
    assert trace.nodes["z_align"]["fn"].log_factor.shape == (NUM_DATA,)
    whole.model.on_batch(torch.arange(NUM_DATA))
    again = poutine.trace(poutine.replay(whole.model, trace)).get_trace(data())
    assert torch.equal(again.nodes["z_align"]["fn"].log_factor, trace.nodes["z_align"]["fn"].log_factor)


def test_rows_are_never_guessed() -> None:
    aligned = made(gamma=1.0)
    x = data()[INDEX]
    with pytest.raises(
        ValueError, match=r"told which data these are .* the plate 'data' has 8, the targets 40"
    ):
        aligned.model(x)
    aligned.model.on_batch(INDEX[:3])
    with pytest.raises(ValueError, match="the plate 'data' has 8 data, the last batch 3"):
        aligned.model(x)
    aligned.model.on_batch(INDEX)
    aligned.model(x)
    aligned.model.eval()  # the batch is over
    aligned.model(x)
    aligned.model.train()
    with pytest.raises(ValueError, match="told which data"):
        aligned.model(x)


@pytest.mark.filterwarnings("ignore:.* of the targets lie above")
def test_the_report_compares_targets_with_the_prior() -> None:
    rho = Density(torch.linspace(-5, 0, 101), torch.ones(101))
    report = made(rho=rho, offset="none").report()
    ceiling = -math.log(2 * math.pi)
    prior = report.prior
    assert prior is not None
    assert (report.target_mean, report.offset) == pytest.approx((-2.5, 0))
    assert report.target_std == pytest.approx(np.linspace(-5, 0, 101).std())
    assert (prior.mean, prior.ceiling) == pytest.approx((ceiling - 1, ceiling))
    assert prior.std == pytest.approx(1, abs=0.05)  # sqrt(d / 2)
    assert report.infeasible == pytest.approx((np.linspace(-5, 0, 101) > ceiling).mean())
    assert (prior.exact_ceiling, prior.learnable) == (True, False)
    assert str(report) == (
        f"targets -2.50 +- 1.46 nats (offset 0.00); log p(z) of the prior -2.84 +- {prior.std:.2f}, at most "
        "-1.84; 37% of targets above that"
    )
    assert report.to_dict()["prior"]["learnable"] is False
    mixture = made("gmm", rho=rho).report()
    assert mixture.prior is not None
    assert (mixture.prior.learnable, mixture.prior.exact_ceiling, mixture.infeasible) == (True, False, None)
    assert made("flow", rho=rho).report().prior is None


def test_targets_out_of_reach_are_warned_of_with_the_option_that_helps() -> None:
    rho = density()
    rho.log_density = rho.log_density + 10
    with pytest.warns(UserWarning, match=r"100% of the targets lie above -1.84, .* use offset='entropy'"):
        made(rho=rho, offset="none")
    made(rho=rho)  # matched: nothing to say
    rho.log_density = rho.log_density * 20
    with pytest.warns(UserWarning, match="use a prior with parameters"):
        made(rho=rho)
    made("gmm", rho=rho)


def test_weights_of_a_few_data_are_warned_of() -> None:
    rho = Density(torch.zeros(200) - 3, torch.ones(200))
    rho.standard_error[7] = 0.01
    with pytest.warns(
        UserWarning, match=r"the heaviest 1 % of the data have 98% of the weight: give a floor"
    ):
        made(rho=rho)
    made(rho=rho, floor=1.0)


class Bounded(dist.MultivariateNormal):
    """A distribution that says that its density is a bound."""

    training_density = "bound"


class Loose(nn.Module):
    """A model that is wrong in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> None:
        normal = dist.Normal(torch.zeros(2), self.weight).to_event(1)
        if self.how == "outside":
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            if self.how == "below":
                pyro.sample("top", normal)
            if self.how == "enumerated":
                z = pyro.sample("z", normal, infer={"enumerate": "parallel"})
            elif self.how not in ("missing", "outside"):
                z = pyro.sample("z", normal)
            else:
                z = torch.zeros(2) if self.how == "missing" else z
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[..., :1])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("outside", "must lie in the plate over the data, at dim -1"),
        ("below", "must be the first latent, .* depends on 'top'"),
        ("enumerated", "must be drawn to be aligned, got one that is enumerated"),
        ("missing", "site must be a latent of the model, got 'z' beside 'x'"),
    ],
)
def test_programs_that_cannot_be_aligned_are_refused(how: str, said: str) -> None:
    aligned = align(Loose(how), programs()[1], density(), offset=0.0, gamma=1.0)
    aligned.model.on_batch(INDEX)
    with pytest.raises(ValueError, match=said):
        aligned.model(data()[INDEX])


def test_a_site_that_was_observed_or_reparametrised_is_refused() -> None:
    aligned = made(gamma=1.0)
    aligned.model.on_batch(INDEX)
    with pytest.raises(ValueError, match="an observed or reparametrised one, whose density is gone"):
        poutine.condition(aligned.model, data={"z": torch.zeros(BATCH, 2)})(data()[INDEX])


def test_priors_without_one_density_are_refused() -> None:
    encoder, decoder = MLPEncoder((X_DIM,), Z_DIM), MLPDecoder(Z_DIM, (X_DIM,))
    with pytest.raises(ValueError, match="got a flat one"):
        align(Autoencoder(decoder, Normal()), PointGuide(encoder), density())
    stats = CodeStats(Z_DIM)
    stats.update(torch.randn(50, Z_DIM))
    paired = XVAE(CodePrior(Z_DIM, "paired", num_codes=20).fit_(stats), decoder, Normal(), encoder)
    with pytest.raises(ValueError, match="one density for all data, got one around the code"):
        align(paired, NormalGuide(encoder), density())
    model, guide = programs()
    model.prior = _Returns(Bounded(torch.zeros(2), torch.eye(2)).mask(torch.tensor(True)))
    with pytest.raises(ValueError, match="only bounded"):
        align(model, guide, density())


class _Returns(nn.Module):
    conditional = False

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self) -> Any:
        return self.fn


def test_an_unknown_prior_needs_an_example_or_an_offset() -> None:
    model, guide = Loose("right"), programs()[1]
    with pytest.raises(ValueError, match=r"offset='auto' needs the prior, which model\.prior"):
        align(model, guide, density())
    assert align(model, guide, density(), offset="learn").aligner.offset == 0
    found = align(model, guide, density(), example=(data()[:1],))
    assert found.aligner.offset == 0  # its scale is a parameter
    report = found.report().prior
    assert report is not None
    assert report.mean == pytest.approx(-1 - math.log(2 * math.pi))
    conditional, encoder = programs("flow")
    matched = align(conditional, encoder, density(), offset="entropy", example=arguments(conditional, INDEX))
    assert matched.targets().mean().item() == pytest.approx(-1 - math.log(2 * math.pi), abs=0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "both"}, "kind must be 'direct' or 'flow', got 'both'"),
        ({"preset": "best"}, "preset must be 'paper', 'released' or None, got 'best'"),
        ({"offset": "some"}, "offset must be 'auto', 'none', 'entropy', 'learn' or a number, got 'some'"),
        ({"offset": math.nan}, "offset must be finite, got nan"),
        ({"weight": "equal"}, "weight must be 'precision', 'inverse' or 'none', got 'equal'"),
        ({"estimator": "two"}, "estimator must be 'sample', 'mean' or 'multi', got 'two'"),
        ({"reduction": "sum"}, "reduction must be 'mean' or 'rms', got 'sum'"),
        ({"detach": "both"}, "detach must be 'guide', 'prior' or None, got 'both'"),
        ({"num_samples": 0}, "num_samples must be positive, got 0"),
        ({"delta": 0.0}, "delta must be positive, got 0"),
        ({"floor": -1.0}, "floor must be finite and not negative, got -1"),
        ({"clip": 1.0}, "clip must be a quantile between 0 and 1, got 1.0"),
        ({"gamma": -0.5}, "gamma must be finite and not negative, or a schedule, got -0.5"),
        ({"flow": nn.Identity()}, "belong to kind='flow'"),
        ({"pretrain_steps": 3}, "belong to kind='flow'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**settings)


@pytest.mark.parametrize(
    ("rho", "said"),
    [
        (Density(torch.tensor([1.0, math.nan]), torch.ones(2)), "log_density must be finite, got 1 values"),
        (Density(torch.zeros(2), torch.tensor([1.0, -1.0])), "standard_error must not be negative, got -1"),
        (Density(torch.zeros(2), torch.tensor([1.0, 0.0])), "must be positive for weight='precision'"),
        (Density(torch.zeros(2), torch.ones(3)), "must have the 2 rows of log_density, got 3"),
        (Density(torch.zeros(2, 2), torch.ones(2)), r"log_density must have shape \(N,\), got \(2, 2\)"),
    ],
)
def test_bad_densities_are_named(rho: Density, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(rho=rho)


def test_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"target must have log_density and standard_error, .* got Tensor"):
        made(rho=torch.zeros(3))
    model, _ = programs()
    with pytest.raises(TypeError, match=r"guide must be an nn\.Module, got function"):
        align(model, lambda x: None, density())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got one that is aligned already"):
        align(*made(), density())


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.5}, {"peak": -1.0}, {"peak": math.inf}])
def test_warm_ups_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        LinearWarmup(**settings)


def test_warm_up_rises_to_its_peak() -> None:
    warm = LinearWarmup(0.5, peak=2.0)
    assert [warm(step, 10) for step in (0, 1, 4, 5, 9)] == pytest.approx([0, 0.4, 1.6, 2, 2])
    assert made(gamma=warm).aligner.gamma == 2  # nobody has told of a step


def test_wrapped_programs_show_what_they_wrap_and_hold_its_state() -> None:
    model, guide = programs("gmm")
    aligned = align(model, guide, density(), offset="learn")
    assert aligned.bare == (model, guide)
    assert tuple(aligned) == (aligned.model, aligned.guide)
    assert aligned.model.prior is model.prior
    assert aligned.guide.encoder is guide.encoder
    assert aligned.model.sample(3).shape == (3, X_DIM)
    assert aligned.model.decode(torch.zeros(2)).event_shape == (X_DIM,)
    assert align(*programs("flow"), density()).model.conditional is True
    with pytest.raises(AttributeError, match="nothing_like_it"):
        aligned.model.nothing_like_it  # noqa: B018
    assert aligned.model.state_dict().keys() == model.state_dict().keys()
    other = programs("gmm", seed=5)
    aligned.model.load_state_dict(other[0].state_dict())
    assert torch.equal(model.prior.loc, other[0].prior.loc)  # type: ignore[union-attr, arg-type]
    twin = copy.deepcopy(aligned)
    assert twin.guide._aligner[0] is twin.aligner is not aligned.aligner
