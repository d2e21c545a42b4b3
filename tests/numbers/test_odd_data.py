"""Data at the edge of what data can be: trained on, converted, or refused in one sentence before training."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pvae.alignment import align
from pvae.data import CorruptData, Data, DataError, MissingPart, from_datasets, from_tensors
from pvae.density import DensityTarget
from pvae.evaluation import LikelihoodEstimate, active_units, latent_scores, log_likelihood
from pvae.experiments import SpecError, load_spec
from pvae.experiments.registry import PARTS
from pvae.experiments.stages import pretrain
from pvae.guides import NormalGuide
from pvae.inference import ELBO, NonFiniteLoss, fit, measure_sigma
from pvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    Likelihood,
    NegativeBinomial,
    Normal,
    Poisson,
)
from pvae.models import VAE, ConditionalVAE
from pvae.nn import LabelEmbedding, LabelSpace, MLPDecoder, MLPEncoder
from pvae.priors import CodePrior, CodeStats, GaussianMixture, StandardNormal, VampPrior
from pvae.priors.code_prior import Variant

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def pair(likelihood: Likelihood | None = None, z_dim: int = 3, x_shape: tuple[int, ...] = (5,)) -> Any:
    """Model and guide."""
    torch.manual_seed(0)
    likelihood = likelihood or Normal()
    decoder = MLPDecoder(z_dim, likelihood.param_shape(x_shape), hidden=(8,))
    guide = NormalGuide(MLPEncoder(x_shape, z_dim, hidden=(8,)))
    return VAE(StandardNormal(z_dim), decoder, likelihood), guide


def labelled(size: int = 3, kind: Any = "class") -> Any:
    """A conditional model and its guide."""
    torch.manual_seed(0)
    labels = LabelEmbedding(LabelSpace(kind, size))
    decoder = MLPDecoder(3, (5,), hidden=(8,), labels=labels)
    guide = NormalGuide(MLPEncoder((5,), 3, hidden=(8,), labels=labels))
    return ConditionalVAE(StandardNormal(3), decoder, Normal()), guide


def train(programs: Any, data: Any, **settings: Any) -> dict[str, Tensor]:
    """Train three steps; return the weights."""
    model, guide = programs
    defaults: dict[str, Any] = {"steps": 3, "batch_size": 4, "progress": False}
    fit(model, guide, data, **defaults | settings)
    return {name: p.detach() for m in programs for name, p in m.named_parameters()}


def judge(programs: Any, x: Any, y: Tensor | None = None, **settings: Any) -> LikelihoodEstimate:
    """Estimate the likelihood with few particles."""
    model, guide = programs
    return log_likelihood(model, guide, x, y, **{"num_particles": 3, "progress": False} | settings)


def score(programs: Any, x: Any, y: Tensor | None = None) -> Tensor:
    """Log-likelihood of each datum."""
    return judge(programs, x, y).log_prob


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# Precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_converted_to_the_precision_of_the_programs(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    programs, others = pair(), pair()
    assert equal(train(programs, x), train(others, x.float()))
    assert torch.equal(score(programs, x), score(programs, x.float()))
    model, guide = programs
    for measure in (latent_scores, active_units):
        assert str(measure(model, guide, x)) == str(measure(model, guide, x.float()))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
)
def test_whole_numbers_are_data_of_a_set_and_refused_as_bare_tensors(dtype: torch.dtype) -> None:
    x = (X.abs() * 2).to(dtype)
    programs = pair()
    assert all(p.isfinite().all() for p in train(programs, x).values())
    assert score(programs, from_tensors(x).train).isfinite().all()
    with pytest.raises(TypeError, match=f"Normal needs floating-point x, got {dtype}"):
        score(programs, x)


def test_programs_in_double_precision_score_data_of_single_and_do_not_train_on_them() -> None:
    model, guide = (part.double() for part in pair())
    assert torch.equal(score((model, guide), X), score((model, guide), X.double()))
    wanted = "^model and guide must be in torch.float32, as the data are, got torch.float64$"
    with pytest.raises(ValueError, match=wanted):
        train((model, guide), X)
    with pytest.raises(ValueError, match=r"must be in torch.float32"):
        train((pair()[0], guide), X)


@pytest.mark.parametrize("kind", ["a torch.sparse_coo", "a meta", "a nested"])
def test_tensors_without_all_their_numbers_are_refused(kind: str) -> None:
    x = X.to_sparse() if "sparse" in kind else X.to("meta")
    if kind == "a nested":
        x = torch.nested.nested_tensor([X, X[:3]], layout=torch.jagged)
    for door in (lambda: train(pair(), x), lambda: from_tensors(X, test=x), lambda: from_tensors(x)):
        with pytest.raises(DataError, match=f"must be a dense tensor that holds numbers, got {kind} tensor"):
            door()
    with pytest.raises(DataError, match=r"^x must be a dense tensor"):
        score(pair(), x)
    with pytest.raises(DataError, match=r"^y of train must be a dense tensor"):
        from_tensors(X, y=x)


def test_complex_numbers_arrays_and_lists_are_refused() -> None:
    with pytest.raises(DataError, match=r"whole numbers, bools or floats, got torch\.complex64"):
        train(pair(), X.to(torch.complex64))
    for x in (X.numpy(), X.tolist()):
        with pytest.raises(TypeError, match="data must be a data set, a split or a tensor, got"):
            train(pair(), x)
        with pytest.raises(TypeError, match="x must be a tensor or a split"):
            score(pair(), x)


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], 1)[:, :5],
        lambda x: x.clone().requires_grad_(),
        lambda x: x.clone().requires_grad_() * 1,
        nn.Parameter,
    ],
    ids=["transposed", "strided", "leaf", "graph", "parameter"],
)
def test_strides_and_gradients_of_data_change_nothing(of: Callable[[Tensor], Tensor]) -> None:
    programs, others, x = pair(), pair(), of(X)
    assert equal(train(programs, x), train(others, X))
    assert torch.equal(score(programs, x), score(programs, X))
    assert x.grad is None if x.is_leaf else True
    assert not from_tensors(x).train.x.requires_grad
    row = of(X)[:1]
    assert equal(train(pair(), row.expand(12, 5)), train(pair(), row.detach().repeat(12, 1)))


# Numbers that are none, and huge ones ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused_at_every_door(number: float) -> None:
    x = X.clone()
    x[7, 2] = number
    for part in ("train", "valid", "test"):
        parts: dict[str, Any] = {"train": X, part: x}
        with pytest.raises(CorruptData, match=f"^{part} must be finite, got nan or inf in datum 7$"):
            from_tensors(**parts)
    for dtype in (torch.float16, torch.float32, torch.float64):
        with pytest.raises(CorruptData, match="train must be finite, got nan or inf in datum 7"):
            train(pair(), x.to(dtype))
    with pytest.raises(ValueError, match=f"^Normal needs finite x, got {number}$"):
        score(pair(), x)
    streamed = from_datasets(
        TensorDataset(x), name="x", fingerprint="1", levels=None, scale="real", num_workers=0
    )
    with pytest.raises(CorruptData, match=r"x of datum 7 must lie in"):
        train(pair(), streamed)


def test_labels_that_are_no_numbers_are_refused() -> None:
    y = torch.rand(12, 2)
    y[3, 1] = float("nan")
    with pytest.raises(CorruptData, match=r"^y of train must be finite"):
        from_tensors(X, y=y)
    with pytest.raises(ValueError, match="y must hold attributes 0 or 1, none missing, got nan"):
        score(labelled(2, "attributes"), X, y.round())
    with pytest.raises(DataError, match=r"class numbers 0, 1, \.\.\. of a whole type, got torch.float32"):
        from_tensors(X, y=torch.full((12,), float("nan")))
    with pytest.raises(TypeError, match=r"y must hold class numbers as integers, got torch.float32"):
        score(labelled(), X, Y.float())


def test_labels_out_of_range_are_found_wherever_they_stand() -> None:
    """The first batch has none: a one-hot vector would be zero, and an embedding raise in the middle."""
    y = Y.clone()
    y[11] = 7
    programs = labelled()
    first = next(from_tensors(X, y=y).train.batches(4, seed=0, epoch=0, drop_last=True))
    assert 11 not in first.index
    before = [p.clone() for m in programs for p in m.parameters()]
    with pytest.raises(ValueError, match=r"y must hold class numbers 0 \.\.\. 2, got 0 \.\.\. 7"):
        train(programs, from_tensors(X, y=y))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (p for m in programs for p in m.parameters()), strict=True)
    )
    with pytest.raises(ValueError, match=r"got 0 \.\.\. 7"):
        train(programs, from_tensors(X, valid=X, y={"train": Y, "valid": y}))
    with pytest.raises(ValueError, match=r"got -1 \.\.\. 1"):
        score(programs, X, Y - 1)
    with pytest.raises(DataError, match="class numbers 0, 1"):
        from_tensors(X, y=Y - 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_class_numbers_may_be_of_any_whole_type(dtype: torch.dtype) -> None:
    programs, others = labelled(), labelled()
    assert equal(train(programs, from_tensors(X, y=Y.to(dtype))), train(others, from_tensors(X, y=Y)))
    assert torch.equal(score(programs, X, Y.to(dtype)), score(programs, X, Y))


@pytest.mark.parametrize(
    ("likelihood", "good", "bad", "said"),
    [
        (Bernoulli(), 1.0, 0.5, "Bernoulli needs x in {0, 1}, got grey values such as 0.5"),
        (ContinuousBernoulli(), 1.0, 1.5, r"ContinuousBernoulli needs x in \[0, 1\]"),
        (Poisson(), 3.0, -1.0, r"Poisson needs x in {0, 1, 2, \.\.\.}, got values such as -1"),
        (NegativeBinomial(), 3.0, -1.0, "NegativeBinomial needs x in"),
        (Poisson(), 3.0, 0.25, "Poisson needs x in"),
        (Categorical(4), 3.0, 4.0, r"Categorical needs x in {0, \.\.\., 3}"),
    ],
    ids=["bernoulli", "continuous_bernoulli", "poisson", "negative_binomial", "fraction", "categorical"],
)
def test_one_datum_outside_the_support_is_found_wherever_it_stands(
    likelihood: Likelihood, good: float, bad: float, said: str
) -> None:
    x = torch.zeros(40, 5)
    x[::2] = good
    x[31, 4] = bad
    programs = pair(likelihood)
    batch = next(from_tensors(x, scale="real").train.batches(4, seed=0, epoch=0, drop_last=True))
    assert 31 not in batch.index
    with pytest.raises(ValueError, match=rf"{said}.* \(datum 31 of the train split\)$"):
        train(programs, from_tensors(x, scale="real"))
    with pytest.raises(ValueError, match=rf"{said}.* \(datum 31 of the valid split\)$"):
        train(programs, from_tensors(x[:30], valid=x, scale="real"))
    with pytest.raises(ValueError, match=said):
        score(programs, x)


def test_data_drawn_anew_need_no_second_look() -> None:
    grey = torch.rand(12, 5)
    assert train(pair(Bernoulli()), from_tensors(grey, valid=grey, binarize="dynamic"))
    assert train(
        pair(ContinuousBernoulli()), from_tensors((grey * 9).to(torch.uint8), levels=10, dequantize=True)
    )


def test_numbers_beyond_single_precision_are_refused_by_their_size() -> None:
    x = X.double()
    x[5, 0] = -2e300
    with pytest.raises(DataError, match=r"^train must lie within ±3.4e\+38, .* got ±2e\+300 in datum 5$"):
        train(pair(), x)
    with pytest.raises(ValueError, match="Normal needs finite x, got -inf"):
        score(pair(), x)
    with pytest.raises(CorruptData, match="y of train must be finite"):
        from_tensors(X, y=torch.full((12, 2), 1e300, dtype=torch.float64))


def test_huge_data_stop_training_with_their_place_and_have_a_likelihood_of_zero() -> None:
    x = X.clone()
    x[5] = 1e30
    with pytest.raises(NonFiniteLoss, match=r"^reconstruction became non-finite at step \d on .*\b5\b"):
        train(pair(), x, epochs=1, steps=None)
    found = score(pair(), x)
    assert found[5] == -torch.inf
    assert found[torch.arange(12) != 5].isfinite().all()


def test_tiny_data_are_zero_or_nearly() -> None:
    for scale in (1e-30, 1e-44):
        assert all(p.isfinite().all() for p in train(pair(), X * scale).values())


# Data that do not vary -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", ["fixed", "learned", "batch", "frozen"])
@pytest.mark.parametrize("all_of_it", [False, True], ids=["pixels", "data"])
def test_zero_variance_keeps_every_sigma_above_its_floor(sigma: Any, all_of_it: bool) -> None:
    x = X.clone()
    x[:, 1:3] = 0.25
    if all_of_it:
        x[:] = 0.25
    programs = pair(Normal(sigma, value=0.5, floor=0.01))
    train(programs, x, steps=60, lr=0.05)
    found = programs[0].likelihood.sigma
    assert float(found.detach()) >= 0.01 - 1e-8
    assert score(programs, x).isfinite().all()


@pytest.mark.parametrize("clamp", ["hard", "soft"])
def test_a_perfect_reconstruction_has_the_floor_for_its_sigma(clamp: Any) -> None:
    model, guide = pair(Normal("batch", floor=0.01, clamp=clamp))
    for part in (model.decoder, guide):
        for p in part.parameters():
            nn.init.zeros_(p)
    measure_sigma(model, guide, from_tensors(torch.zeros(12, 5), scale="real").train)
    assert float(model.likelihood.sigma) == pytest.approx(0.01)
    assert score((model, guide), torch.zeros(3, 5)).isfinite().all()


@pytest.mark.parametrize(
    ("likelihood", "value"),
    [
        (Bernoulli(), 0.0),
        (Bernoulli(), 1.0),
        (ContinuousBernoulli(), 0.0),
        (ContinuousBernoulli(), 0.5),
        (ContinuousBernoulli(), 1.0),
        (Poisson(), 0.0),
        (NegativeBinomial(), 0.0),
        (NegativeBinomial(), 40.0),
        (Categorical(3), 2.0),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Likelihood) else f"{v:g}",
)
def test_images_of_one_value_train_under_every_likelihood(likelihood: Likelihood, value: float) -> None:
    programs, x = pair(likelihood), torch.full((12, 5), value)
    before = score(programs, x).mean()
    train(programs, from_tensors(x, scale="real"), steps=30, lr=0.02)
    assert before.isfinite()
    assert score(programs, x).mean() > before


def test_images_of_one_value_train_under_a_mixture_of_logistics() -> None:
    for value in (0.0, 1.0):
        x = torch.full((8, 1, 2, 2), value)
        programs = pair(DiscretizedLogisticMixture(2), x_shape=(1, 2, 2))
        train(programs, from_tensors(x, scale="unit", levels=256), steps=10)
        assert score(programs, x).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*hardly vary.*:UserWarning")
@pytest.mark.parametrize("values", ["pixels", "data"])
def test_an_x_vae_takes_pixels_and_codes_that_do_not_vary(values: str) -> None:
    spec = load_spec(
        "x-vae-digits",
        [
            *("z_dim=2", "encoder.hidden=[8]", "decoder.hidden=[8]", "autoencoder.epochs=1"),
            *("fit.steps=3", "fit.batch_size=16", "prior.components=2"),
        ],
    )
    x = torch.randint(0, 17, (130, 1, 8, 8), dtype=torch.uint8)
    x[:, :, :3] = 0
    if values == "data":
        x[:] = 7
    data = from_tensors(x, test=x, levels=17)
    program = spec.build(data)
    stage = pretrain(spec, program, data, progress=False)
    assert bool(stage.stats.scale().dead.all()) == (values == "data")
    fit(*program, data, **spec.fit.arguments(), progress=False)
    assert score(program, data.test[:4]).isfinite().all()


def test_a_density_of_data_with_dead_pixels_is_that_of_the_others() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    dead = torch.cat([x[:, :2], torch.full((200, 3), 0.7), x[:, 2:]], 1)
    with_them, without = (DensityTarget.fit(part, dim=4, projection="pca") for part in (dead, x))
    torch.testing.assert_close(with_them.log_density, without.log_density)
    model, guide = pair(z_dim=4, x_shape=(7,))
    aligned = align(model, guide, with_them)
    assert all(p.isfinite().all() for p in train((aligned.model, aligned.guide), dead).values())
    with pytest.raises(ValueError, match="dim must be at most 4, the directions in which x varies, got 5"):
        DensityTarget.fit(dead, dim=5, projection="pca")
    with pytest.raises(ValueError, match="u must vary in every column, got 3 constant of 7"):
        DensityTarget.fit(dead, projection="identity")
    with pytest.raises(ValueError, match="dim must be at most 0, the directions in which x varies"):
        DensityTarget.fit(torch.full((50, 4), 0.3), dim=2, projection="pca")


# Few data, few latents -------------------------------------------------------------------------------------


def test_one_datum_trains_and_is_scored() -> None:
    programs = pair(Normal("batch"))
    train(programs, from_tensors(X[:1], valid=X[:1], test=X[:1]), batch_size=1, ema=0.9)
    estimate = judge(programs, X[:1], num_particles=40)
    assert estimate.log_prob.isfinite().all()
    assert np.isnan(estimate.standard_error)
    assert "Monte-Carlo error" in str(estimate)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch_size must lie between 1 and the 1 training data, got 4$"):
        train(pair(), X[:1])
    assert len(score(pair(), X[:3])) == 3
    estimate = judge(pair(), X[:3], batch_size=512)
    assert torch.equal(estimate.log_prob, score(pair(), X[:3]))


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_an_empty_part_is_refused_and_a_missing_one_named(part: str) -> None:
    parts: dict[str, Any] = {"train": X, part: X[:0]}
    with pytest.raises(
        DataError, match=rf"^{part} must have shape \(N, \*x_shape\) without a zero, got \(0, 5\)$"
    ):
        from_tensors(**parts)
    with pytest.raises(ValueError, match="the selection must hold at least one datum of 12, got none"):
        from_tensors(X).train[:0]
    with pytest.raises(ValueError, match=r"x must have shape \(N, \*x_shape\) with N >= 1, got \(0, 5\)"):
        score(pair(), X[:0])
    if part != "train":
        with pytest.raises(MissingPart, match=f"custom has no {part} part"):
            getattr(from_tensors(X), part)


@pytest.mark.parametrize("objective", ["elbo", "mean_field", "iwae", "dreg"])
def test_one_particle_is_the_elbo_of_every_objective(objective: Any) -> None:
    programs, others = pair(), pair()
    weights = train(programs, X, objective=objective, num_particles=1)
    assert all(p.isfinite().all() for p in weights.values())
    if objective == "iwae":
        for name, weight in train(others, X, objective="elbo").items():
            torch.testing.assert_close(weights[name], weight)
    estimate = judge(programs, X, num_particles=1)
    assert estimate.elbo == pytest.approx(estimate.mean)
    with pytest.raises(ValueError, match="num_particles must be positive, got 0"):
        train(pair(), X, num_particles=0)


def test_a_batch_of_one_under_batch_norm_is_refused_before_training() -> None:
    model, guide = pair()
    guide.encoder.hidden = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    before = [p.clone() for p in guide.parameters()]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        train((model, guide), X, batch_size=1)
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    train((model, guide), X)
    assert torch.equal(score((model, guide), X[:1]), score((model, guide), X)[:1])


POSTERIORS = ["normal", "full_covariance", "five", "laplace"]
PRIORS = {
    "normal": [],
    "mixture": ["prior.components=3"],
    "vamp": ["prior.components=3"],
    "diffusion": ["prior.num_steps=4"],
}
LADDERS = {"ladder": "dvp-tiny", "hvae": "hvae-mnist"}
CODES = ("diag", "full", "gmm", "kde", "marginal", "paired")


@pytest.fixture(scope="module")
def digits() -> Data:
    x = torch.randint(0, 17, (48, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(48) % 10
    return from_tensors(x, test=x[:4], levels=17, binarize="dynamic", y={"train": y, "test": y[:4]})


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("prior", list(PRIORS))
def test_one_latent_under_every_prior_and_guide(prior: str, posterior: str, digits: Data) -> None:
    spec = load_spec(
        "vae", ["z_dim=1", f"prior={prior}", f"posterior={posterior}", *PRIORS[prior], "fit.steps=2"]
    )
    program = spec.build(digits)
    fit(*program, digits, **spec.fit.arguments() | {"batch_size": 8}, progress=False)
    assert score(program, digits.test).isfinite().all()
    model: Any = program.model
    assert model.sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("posterior=flow", "a coupling needs at least two latent dimensions, got 1"),
        ("prior=conditional_flow", "a coupling needs at least two latent dimensions, got 1"),
        ("prior=conditional_spline", "z_dim must be at least 2"),
    ],
)
def test_one_latent_cannot_be_coupled_with_another(override: str, said: str, digits: Data) -> None:
    with pytest.raises(SpecError, match=said):
        load_spec("vae", ["z_dim=1", override]).build(digits)


@pytest.mark.parametrize("name", list(LADDERS.values()))
def test_one_latent_in_every_step_of_a_ladder(name: str, digits: Data) -> None:
    spec = load_spec(name, ["z_dim=1"] + (["prior.components=3"] if name == "hvae-mnist" else []))
    program = spec.build(digits)
    assert ELBO().terms(*program, digits.test.x).bound.isfinite().all()


@pytest.mark.parametrize("name", CODES)
def test_one_latent_under_every_prior_of_codes(name: Any) -> None:
    codes = torch.randn(40, 1, generator=torch.Generator().manual_seed(4))
    stats = CodeStats(1, "full")
    stats.update(codes, torch.arange(40))
    options: dict[str, Any] = {"components": 2} if name in ("gmm", "marginal") else {}
    prior = CodePrior(1, variant=name, **options | ({"bandwidth": 0.3} if name == "paired" else {}))
    prior.fit_(stats)
    fn = prior(code=codes[:5]) if prior.needs_code else prior()
    z = fn.sample() if prior.needs_code else fn.sample((5,))
    assert z.shape == (5, 1)
    assert fn.log_prob(z).isfinite().all()


def test_every_prior_and_posterior_has_its_case_of_one_latent() -> None:
    coupled = {"conditional_flow", "conditional_spline", "flow"}
    assert {*PRIORS, "codes", "none"} | coupled - {"flow"} == set(PARTS["prior"])
    assert {*POSTERIORS, *LADDERS, "flow"} == set(PARTS["posterior"])
    assert set(CODES) == set(get_args(Variant))


def test_more_components_than_data_are_refused_where_they_are_made_of_data() -> None:
    with pytest.raises(ValueError, match="N >= 10, got"):
        GaussianMixture.from_codes(torch.randn(3, 2))
    encoder = MLPEncoder((5,), 1, hidden=(8,))
    assert VampPrior(encoder, X[:1], bounds=None)().sample((4,)).shape == (4, 1)


# Devices ---------------------------------------------------------------------------------------------------


def test_programs_on_two_devices_are_refused() -> None:
    model, guide = pair()
    with pytest.raises(ValueError, match="model and guide must lie on one device, got cpu, meta"):
        train((model, guide.to("meta")), X)
    with pytest.raises(ValueError, match="model and guide must lie on one device, got cpu, meta"):
        score((model, guide.to("meta")), X)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_data_follow_the_programs_to_their_device() -> None:
    model, guide = (part.cuda() for part in pair())
    train((model, guide), from_tensors(X, valid=X))
    train((model, guide), from_tensors(X, valid=X).to("cuda"))
    assert torch.equal(score((model, guide), X), score((model, guide), X.cuda()))
    here = pair()
    train(here, from_tensors(X, valid=X).to("cuda"))
    assert next(here[0].parameters()).device.type == "cpu"
