"""Building programs: every combination of parts, independent starts, refusals that name the choices."""

import math
import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pvae.data import Data, from_tensors
from pvae.experiments import Program, SpecError
from pvae.experiments.registry import PARTS, register
from pvae.experiments.spec import parse
from pvae.inference import ELBO
from pvae.likelihoods import Categorical
from pvae.priors import GaussianMixture, VampPrior

TINY = ["z_dim=3", "encoder.hidden=[8]", "decoder.hidden=[8]"]
SPEC = "[data]\nname = 'digits'\n[fit]\nsteps = 2\n"

# Of each kind of values, data of that kind and the likelihoods that take them.
TAKES = {
    "binary": {"bernoulli", "categorical"},
    "unit": {"continuous_bernoulli", "normal", "discretized_logistic_mixture"},
    "count": {"normal", "categorical", "poisson", "negative_binomial"},
    "real": {"normal"},
}


def _data(values: str) -> Data:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 5, (40, 1, 4, 4), generator=generator)
    made = {
        "binary": (x > 2).float(),
        "unit": x / 4,
        "count": x,
        "real": torch.randn(40, 1, 4, 4, generator=generator),
    }[values]
    levels = 5 if values in ("unit", "count") else None
    scale = "count" if values == "count" else "default"
    data = from_tensors(made[:30], made[30:35], made[35:], levels=levels, scale=scale)
    assert data.protocol.values == values
    return data


def _build(data: Data, *overrides: str) -> Program:
    return parse(SPEC, [*TINY, *overrides]).build(data)


def _loss(program: Program, data: Data) -> float:
    return ELBO().loss(program.model, program.guide, data.train.x[:8])


SMALL_PRIOR: dict[str, list[str]] = {
    "normal": [],
    "mixture": ["prior.components=4"],
    "vamp": ["prior.components=4"],
    "diffusion": ["prior.hidden=8", "prior.num_steps=3"],
}
LADDER = [
    *(f"{table}=ladder" for table in ("model", "posterior", "encoder", "decoder")),
    "decoder.scales=[[2,1],[1,1]]",
    "decoder.channels=4",
]


@pytest.mark.parametrize("posterior", sorted(PARTS["posterior"].keys() - {"ladder", "hvae"}))
@pytest.mark.parametrize("prior", ["normal", "mixture", "vamp", "diffusion"])
def test_any_prior_with_any_posterior(prior: str, posterior: str) -> None:
    data, small = _data("binary"), SMALL_PRIOR[prior]
    program = _build(data, f"prior={prior}", f"posterior={posterior}", *small)
    assert math.isfinite(_loss(program, data))
    assert program.model.sample(5).shape == (5, 1, 4, 4)  # type: ignore[operator]


@pytest.mark.parametrize("pseudoinput", ["dct", "downsampled", "linear"])
@pytest.mark.parametrize("prior", ["normal", "mixture", "diffusion"])
def test_a_ladder_takes_any_prior_of_any_pseudoinputs(prior: str, pseudoinput: str) -> None:
    data = _data("binary")
    u = [f"pseudoinput={pseudoinput}", "pseudoinput.size=2"]
    program = _build(data, *LADDER, f"prior={prior}", *SMALL_PRIOR[prior], *u)
    assert math.isfinite(_loss(program, data))
    assert program.model.sample(5).shape == (5, 1, 4, 4)  # type: ignore[operator]


@pytest.mark.parametrize("values", sorted(TAKES.keys() - {"real"}))
@pytest.mark.parametrize("likelihood", list(PARTS["likelihood"]))
def test_a_ladder_takes_the_likelihood_of_any_data_with_a_range(likelihood: str, values: str) -> None:
    if likelihood in TAKES[values]:
        data = _data(values)
        u = ["prior=diffusion", *SMALL_PRIOR["diffusion"], "pseudoinput=dct", "pseudoinput.size=2"]
        assert math.isfinite(_loss(_build(data, *LADDER, *u, f"likelihood={likelihood}"), data))


def test_the_plain_ladder_has_neither_pseudoinputs_nor_a_prior() -> None:
    program = _build(_data("binary"), *LADDER, "prior=none")
    assert program.model.prior is None
    assert math.isfinite(_loss(program, _data("binary")))


@pytest.mark.parametrize("prior", ["normal", "mixture", "vamp", "diffusion"])
def test_two_levels_take_any_prior(prior: str) -> None:
    data = _data("binary")
    two = ["model=hvae", "posterior=hvae", "decoder=pair", "decoder.z_1_dim=3"]
    program = _build(data, *two, f"prior={prior}", *SMALL_PRIOR[prior])
    assert math.isfinite(_loss(program, data))
    assert program.model.sample(5).shape == (5, 1, 4, 4)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("overrides", "message"),
    {
        "posterior=ladder": r"\[posterior\] kind = 'ladder' needs \[model\] kind = 'ladder', got 'vae'",
        "model=hvae": r"\[model\] kind = 'hvae' needs \[posterior\] kind = 'hvae', got 'normal'",
        "prior=none": r"\[prior\] kind = 'none' needs \[model\] kind = 'ladder', got 'vae'",
        "pseudoinput=dct": r"\[pseudoinput\] kind = 'dct' needs \[model\] kind = 'ladder', got 'vae'",
        " ".join(LADDER): r"plain ladder has its priors in the network: set prior = 'none'",
        " ".join(
            [*LADDER, "prior=none", "pseudoinput=dct", "pseudoinput.size=2"]
        ): r"pseudoinputs need a prior",
        " ".join(
            [*LADDER, "prior=vamp", "pseudoinput=dct", "pseudoinput.size=2"]
        ): r"gives features, not codes",
        " ".join([*LADDER, "prior=codes", "pseudoinput=dct", "pseudoinput.size=2"]): r"are no codes of",
        "prior=diffusion prior.denoiser=unet": r"denoiser = 'unet' needs planes",
    }.items(),
)
def test_parts_that_are_made_for_each_other_say_so(overrides: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        _build(_data("binary"), *overrides.split())


def test_every_registered_likelihood_is_named_here() -> None:
    assert set.union(*TAKES.values()) == set(PARTS["likelihood"])


@pytest.mark.parametrize("values", list(TAKES))
@pytest.mark.parametrize("likelihood", list(PARTS["likelihood"]))
def test_a_likelihood_takes_its_values_and_no_others(likelihood: str, values: str) -> None:
    data = _data(values)
    if likelihood in TAKES[values]:
        assert math.isfinite(_loss(_build(data, f"likelihood={likelihood}"), data))
        return
    with pytest.raises(SpecError, match=f"kind = '{likelihood}' needs") as caught:
        _build(data, f"likelihood={likelihood}")
    named = set(re.findall(r"'(\w+)'", str(caught.value).split("likelihood.kind = ")[1]))
    assert named == TAKES[values]


@pytest.mark.parametrize(("encoder", "decoder"), [("conv", "conv"), ("mlp", "conv"), ("conv", "mlp")])
def test_convolutional_networks(encoder: str, decoder: str) -> None:
    data = _data("unit")
    program = _build(
        data, "encoder=" + encoder, "decoder=" + decoder, "likelihood=discretized_logistic_mixture"
    )
    assert math.isfinite(_loss(program, data))


def test_networks_that_do_not_fit_the_data_are_refused() -> None:
    data = from_tensors(torch.randn(20, 2), torch.randn(5, 2))
    with pytest.raises(SpecError, match=r"\[encoder\] kind = 'conv': x_shape .*got \(2,\)"):
        _build(data, "likelihood=normal", "encoder=conv")


def test_bernoulli_with_grey_data_names_the_choices() -> None:
    with pytest.raises(SpecError) as caught:
        _build(_data("unit"))
    assert str(caught.value) == (
        "[likelihood] kind = 'bernoulli' needs x in {0, 1}, but custom comes as x in [0, 1]: set "
        "data.binarize = 'dynamic', 'static' or 'threshold', or likelihood.kind = "
        "'continuous_bernoulli', 'normal' or 'discretized_logistic_mixture'"
    )


@pytest.mark.parametrize(
    ("start", "remedy"),
    [
        (["likelihood=bernoulli", "data.binarize=none"], ["data.binarize=dynamic"]),
        (["likelihood=bernoulli", "data.binarize=none"], ["data.binarize=static"]),
        (["likelihood=bernoulli", "data.binarize=none"], ["data.binarize=threshold"]),
        (
            ["likelihood=bernoulli", "data.binarize=none", "data.scale=count"],
            ["data.scale=unit", "data.binarize=static"],
        ),
        (["likelihood=poisson"], ["data.scale=count", "data.binarize=none"]),
        (["likelihood=poisson", "data.binarize=none"], ["data.scale=count"]),
        (["likelihood=normal"], ["data.binarize=none"]),
        (
            ["likelihood=discretized_logistic_mixture", "data.binarize=none", "data.scale=count"],
            ["data.scale=unit"],
        ),
        (
            ["likelihood=discretized_logistic_mixture", "data.binarize=none", "data.dequantize=true"],
            ["data.dequantize=false"],
        ),
    ],
)
def test_a_named_remedy_is_one(start: list[str], remedy: list[str]) -> None:
    spec = parse(SPEC, [*TINY, *start])
    with pytest.raises(SpecError) as caught:
        spec.build(spec.load_data())
    for override in remedy:
        key, value = override.split("=")
        assert key in str(caught.value)
        assert value in str(caught.value)
    cured = parse(SPEC, [*TINY, *start, *remedy])
    cured.build(cured.load_data())


def test_data_without_levels_are_not_told_to_be_loaded_otherwise() -> None:
    with pytest.raises(SpecError, match=r"comes as real x: set likelihood.kind = 'normal'$"):
        _build(_data("real"))


def test_levels_come_from_the_data() -> None:
    likelihood = _build(_data("count"), "likelihood=categorical").model.get_submodule("likelihood")
    assert isinstance(likelihood, Categorical)
    assert likelihood.levels == 5


def test_exchanging_a_part_leaves_the_others_at_the_same_start() -> None:
    data = _data("binary")
    one, two = _build(data), _build(data, "prior=vamp", "prior.components=4", "posterior=full_covariance")
    assert _same(_encoder(one), _encoder(two))
    assert _same(one.model.get_submodule("decoder"), two.model.get_submodule("decoder"))
    other = _build(data, "fit.seed=1")
    assert not _same(_encoder(one), _encoder(other))


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    _build(_data("binary"), "prior=vamp", "prior.components=4")
    assert torch.equal(before, torch.get_rng_state())


def test_the_vamp_prior_shares_the_guides_encoder() -> None:
    program = _build(_data("binary"), "prior=vamp", "prior.components=4")
    names = [name for name, _ in program.model.named_parameters()]
    assert not any("encoder" in name for name in names)
    assert _vamp(program)._encoder[0] is _encoder(program)


def test_pseudoinputs_start_at_different_training_data_and_inside_the_bounds() -> None:
    data = _data("binary")
    u = _vamp(_build(data, "prior=vamp", "prior.components=30")).u.detach()
    assert ((u > 0) & (u < 1)).all()
    nearest = (u.flatten(1).unsqueeze(1) - data.train.x.flatten(1)).abs().amax(-1)
    assert (nearest.min(1).values < 0.06).all()
    assert sorted(u.round().flatten(1).tolist()) == sorted(data.train.x.flatten(1).tolist())


def test_pseudoinputs_may_start_at_one_level() -> None:
    overrides = ["prior=vamp", "prior.components=50", "prior.init=constant", "prior.init_mean=0.4"]
    u = _vamp(_build(_data("unit"), *overrides, "likelihood=normal")).u
    assert u.mean().item() == pytest.approx(0.4, abs=3 * 0.01 / math.sqrt(u.numel()))
    assert u.std().item() == pytest.approx(0.01, rel=0.1)


def test_pseudoinputs_have_the_bounds_of_the_data() -> None:
    assert _vamp(_build(_data("binary"), "prior=vamp", "prior.components=2")).bounds == (0.0, 1.0)
    count = _vamp(_build(_data("count"), "prior=vamp", "prior.components=2", "likelihood=poisson"))
    assert count.bounds == (0.0, 4.0)
    real = _vamp(_build(_data("real"), "prior=vamp", "prior.components=2", "likelihood=normal"))
    assert real.bounds is None


def test_more_pseudoinputs_than_data_are_refused() -> None:
    with pytest.raises(SpecError, match=r"\[prior\] kind = 'vamp': components must be at most 30"):
        _build(_data("binary"), "prior=vamp", "prior.components=31")
    constant = _build(_data("binary"), "prior=vamp", "prior.components=31", "prior.init=constant")
    assert len(_vamp(constant).u) == 31


def test_a_mixture_may_start_at_codes_of_data() -> None:
    data = _data("binary")
    overrides = ["prior=mixture", "prior.components=3", "prior.init=codes"]
    program = _build(data, *overrides)
    prior = program.model.get_submodule("prior")
    assert isinstance(prior, GaussianMixture)
    loc, scale = _encoder(program)(data.train.x)
    # Expectation maximisation keeps the mean of what it fits, here up to the noise of 30 codes.
    weights = prior.logits.softmax(-1).unsqueeze(-1)
    torch.testing.assert_close((weights * prior.loc).sum(0), loc.mean(0), atol=3 * 30**-0.5, rtol=0)
    assert scale.mean() < 2
    random = _build(data, *overrides[:2]).model.get_submodule("prior")
    assert not torch.allclose(prior.loc, random.get_parameter("loc"))


@pytest.fixture
def _circle() -> Iterator[None]:
    def needs_posterior(posterior: nn.Module) -> nn.Module:
        return posterior

    def needs_prior(prior: nn.Module) -> nn.Module:
        return prior

    register("prior", "chicken", needs_posterior, about="", symbols="")
    register("posterior", "egg", needs_prior, about="", symbols="")
    yield
    del PARTS["prior"]["chicken"], PARTS["posterior"]["egg"]


@pytest.mark.usefixtures("_circle")
def test_parts_that_need_each_other_are_refused() -> None:
    with pytest.raises(
        SpecError, match=r"\[prior\] and \[posterior\] of this spec each need the other first"
    ):
        _build(_data("binary"), "prior=chicken", "posterior=egg")


def _same(one: nn.Module, two: nn.Module) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _encoder(program: Program) -> nn.Module:
    return program.guide.get_submodule("encoder")


def _vamp(program: Program) -> VampPrior:
    prior = program.model.get_submodule("prior")
    assert isinstance(prior, VampPrior)
    return prior
