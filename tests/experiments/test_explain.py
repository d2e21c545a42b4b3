# ruff: noqa: RUF001  (mathematical symbols)
"""A spec in symbols: every part contributes its line, with the right spaces, sizes and notes."""

import re

import pytest

from pvae.experiments import Spec
from pvae.experiments.explain import explain, num_parameters, objective
from pvae.experiments.registry import PARTS
from pvae.experiments.spec import load_spec, parse

SMALL = ["z_dim=3", "encoder.hidden=[5]", "decoder.hidden=[4]"]


def _spec(*overrides: str) -> Spec:
    return parse("description = 'a test'\n[data]\nname = 'digits'\n[fit]\nepochs = 2\n", [*SMALL, *overrides])


def _lines(spec: Spec) -> dict[str, str]:
    """What stands behind each heading."""
    return _lines_of(explain(spec, spec.load_data()))


def _lines_of(text: str) -> dict[str, str]:
    rows = (re.fullmatch(r"([a-z]+(?: by)?) {2,}(.+)", line) for line in text.splitlines())
    return {row[1]: row[2] for row in rows if row}


def test_the_gaussian_vae() -> None:
    lines = _lines(_spec())
    assert lines["data"].startswith("x ∈ {0, 1}^(1×8×8)   digits: binarized (dynamic)")
    assert lines["latent"] == "z ∈ ℝ³"
    assert lines["joint"] == "p(x, z) = p(z) p(x | z)"
    assert lines["prior"] == "p(z) = N(z; 0, I)"
    assert lines["likelihood"] == "p(x | z) = ∏ᵢ Bernoulli(xᵢ; sigmoid θᵢ(z))"
    assert lines["decoder"] == "θ: ℝ³ → parameters of p(x | z), fully connected  (hidden 4, activation relu)"
    assert lines["guide"] == "q(z | x) = N(z; μ(x), diag σ²(x))  (entropy sampled)"
    assert lines["encoder"] == "μ, σ: {0, 1}^(1×8×8) → ℝ³, fully connected  (hidden 5, activation relu)"
    assert lines["objective"] == "maximise  E_q [log p(x | z) + log p(z) − log q(z | x)],  1 draw of z"
    assert lines["judged by"].endswith("p(x, zₖ) / q(zₖ | x),  K = 1,000 on the test data")
    # 64-5-(3 + 3) and 3-4-64, with biases.
    assert lines["parameters"] == "decoder 336, encoder 361, in all 697"
    assert "note" not in lines


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "E_q [log p(x | z) + log p(z) − log q(z | x)],  1 draw of z"),
        (["num_particles=4"], "E_q [log p(x | z) + log p(z) − log q(z | x)],  4 draws of z"),
        (["beta_warmup=5"], "E_q [log p(x | z) + β (log p(z) − log q(z | x))],  1 draw of z"),
        (["objective=mean_field"], "E_q log p(x | z) − KL(q(z | x) ‖ p(z)),  1 draw of z"),
        (["objective=mean_field", "beta_warmup=1"], "E_q log p(x | z) − β KL(q(z | x) ‖ p(z)),  1 draw of z"),
        (
            ["objective=iwae", "num_particles=5"],
            "E log 1/5 Σₖ p(x, zₖ) / q(zₖ | x),  zₖ ~ q(z | x), k = 1 … 5",
        ),
        (
            ["objective=dreg", "num_particles=2", "beta_warmup=1"],
            "E log 1/2 Σₖ p(x | zₖ) (p(zₖ) / q(zₖ | x))^β,  zₖ ~ q(z | x), k = 1 … 2",
        ),
    ],
)
def test_objective(overrides: list[str], expected: str) -> None:
    assert objective(_spec(*(f"fit.{override}" for override in overrides))) == f"maximise  {expected}"


def test_a_conditional_model_says_what_sees_the_label() -> None:
    lines = _lines(_spec("model=conditional", "prior=conditional_flow", "decoder.label_dim=4"))
    assert lines["joint"] == "p(x, z | y) = p(z | y) p(x | z, y)"
    assert lines["prior"].startswith("p(z | y) = N(f(z); μ(y), diag σ²(y)) |det ∂f/∂z|,  f = 4 couplings")
    assert lines["guide"].startswith("q(z | x) = N(z; μ(x)")
    assert lines["objective"].startswith("maximise  E_q [log p(x | z, y) + log p(z | y) − log q(z | x)]")
    assert lines["judged by"].startswith("log p(x | y) ≥ E log 1/K Σₖ p(x, zₖ | y) / q(zₖ | x)")
    lines = _lines(_spec("model=conditional", "encoder.label_dim=4", "decoder.label_dim=4"))
    assert lines["joint"] == "p(x, z | y) = p(z) p(x | z, y)"
    assert lines["guide"].startswith("q(z | x, y) = N(z; μ(x, y), diag σ²(x, y))")


def test_an_x_vae_says_its_first_stage() -> None:
    text = explain(_spec("model=x_vae", "prior=codes", "autoencoder.code_l2=0.1"), None)
    assert "first stage minimise  −log p(x | z = a(x)) + 0.1 ‖a(x)‖²,  20 epochs at 0.001" in text
    assert "first stage" not in explain(_spec(), None)


def _five(*overrides: str) -> dict[str, str]:
    """What is said of FIVE; lines without a heading stand behind the one before, after a bar."""
    spec = _spec(
        "data.binarize=none", "data.dequantize=true", "likelihood=normal", "posterior=five", *overrides
    )
    text = explain(spec, spec.load_data())
    return _lines_of(re.sub(r"\n {12}", " | ", text))


def test_five_says_what_its_loss_is() -> None:
    lines = _five()
    assert lines["guide"].startswith(
        "q(z | x) = N(z; f(x), σ² f′(x) f′(x)ᵀ)  (objective five, logdet surrogate"
    )
    assert lines["guide"].endswith(
        " | f the encoder's location, σ the likelihood's, g the decoder's mean of x"
    )
    assert lines["encoder"].startswith("f: [0, 1]^(1×8×8) → ℝ³, fully connected")
    assert lines["objective"].startswith(
        "maximise  E_q [log p(x | z) + log p(z) − log q(z | x)],  1 draw of z"
    )
    assert lines["loss"] == (
        "a surrogate of minus this bound: below it on average, its gradient off by about the posterior "
        "variance; validation is exact | ∂ ½ log det(f′ f′ᵀ) ≈ E ∂ uᵀ f′(x) SG[g′(f(x)) u],  "
        "u uniform on the sphere of radius √3, 1 probe,  SG held constant"
    )
    assert lines["judged by"].startswith("log p(x) ≥ E log 1/K Σₖ p(x, zₖ) / r(zₖ | x),  K = 1,000")
    assert " | r = q, and r = N(f(x), Σ),  Σ⁻¹ = diag τ⁻² + g′(f(x))ᵀ g′(f(x)) / σ²" in lines["judged by"]
    # 64-5-3 and 3-4-64, with biases: the encoder's scales are not trained.
    assert lines["parameters"] == "decoder 336, encoder 343, in all 679"
    assert "loss" not in _lines(_spec())
    assert "cost" not in _lines(_spec())


@pytest.mark.parametrize(
    ("overrides", "loss", "stands"),
    [
        (
            ["posterior.probe=data"],
            "a surrogate of minus this bound: below",
            "≈ E ∂ SG[g′(f(x))ᵀ v]ᵀ f′(x) v",
        ),
        (
            ["posterior.logdet=pinv", "posterior.num_probes=2"],
            "minus this bound, in value and, without",
            "2 probes",
        ),
        (
            ["posterior.logdet=pinv"],
            "minus this bound, in value and, without bias",
            "= E ∂ uᵀ f′(x) SG[f′(x)⁺ u]",
        ),
        (["posterior.directions=rademacher"], "a surrogate of minus this bound", "u of entries ±1, 1 probe"),
        (["posterior.logdet=exact"], "minus this bound, log det by the full Jacobian in every step", ""),
        (
            ["posterior.objective=fif"],
            "a surrogate of minus this, no bound on log p(x): another value",
            "≈ E ∂ uᵀ",
        ),
        (
            ["posterior.objective=fif", "posterior.logdet=exact"],
            "minus this, no bound on log p(x), log det",
            "",
        ),
        (
            ["posterior.objective=fif", "posterior.logdet=pinv"],
            "minus this, no bound on log p(x), with another",
            "=",
        ),
        (["fit.objective=iwae", "fit.num_particles=2"], "minus this bound, with the exact log q", ""),
    ],
)
def test_the_loss_of_five_follows_its_options(overrides: list[str], loss: str, stands: str) -> None:
    said, _, how = _five(*overrides)["loss"].partition(" | ")
    assert said.startswith(loss)
    assert stands in how
    assert bool(stands) == bool(how)


def test_the_free_form_loss_is_no_expectation() -> None:
    lines = _five("posterior.objective=fif", "fit.beta_warmup=2")
    assert lines["objective"].startswith(
        "maximise  log p(x | z) + β (log p(z) + ½ log det(2π σ² f′(x) f′(x)ᵀ))  at z = f(x)"
    )
    assert objective(_spec("posterior=five", "posterior.objective=fif")) == (
        "maximise  log p(x | z) + log p(z) + ½ log det(2π σ² f′(x) f′(x)ᵀ)  at z = f(x)"
    )


@pytest.mark.parametrize(
    ("overrides", "cost"),
    [
        ([], "2 tangents of the encoder and 1 tangent of the decoder"),
        (["posterior.probe=data"], "1 tangent of the encoder and 1 cotangent of the decoder"),
        (
            ["posterior.num_probes=3", "fit.num_particles=2"],
            "5 tangents of the encoder and 3 tangents of the decoder",
        ),
        (["posterior.objective=fif"], "1 tangent of the encoder and 1 tangent of the decoder"),
        (["posterior.logdet=exact"], "3 passes of the encoder"),
        (["posterior=laplace"], "3 tangents of the decoder"),
    ],
)
def test_what_a_step_costs_beside_a_diagonal_posterior(overrides: list[str], cost: str) -> None:
    said = _five(*overrides)["cost"]
    assert said.startswith(f"{cost} more in each step than with posterior = 'normal'")
    times = {"": "2.5", "posterior.probe=data": "2"}.get(" ".join(overrides))
    assert said.endswith(f": about {times} × the time on a CPU" if times else "'normal'")


def test_convolutions_cost_more() -> None:
    spec = load_spec("five-mnist", ["encoder=conv", "decoder=conv"])
    assert ": about 3.5 × the time on a CPU" in explain(spec, None)


def test_the_proposal_of_the_evaluation_is_said() -> None:
    assert _five("evaluate.proposal=own")["judged by"].endswith("/ q(zₖ | x),  K = 1,000 on the test data")
    laplace = _lines(_spec("data.binarize=none", "likelihood=normal", "evaluate.proposal=laplace"))
    assert laplace["judged by"].endswith("/ r(zₖ | x),  K = 1,000 on the test data")
    text = explain(_spec("likelihood=normal", "evaluate.proposal=laplace"), None)
    assert (
        "\n            r = N(μ(x), Σ),  Σ⁻¹ = diag τ⁻² + g′(μ(x))ᵀ g′(μ(x)) / σ²,  τ the prior's scale"
        in text
    )


def test_a_ladder_is_said_layer_by_layer() -> None:
    spec = load_spec("dvp-tiny")
    lines = _lines_of(explain(spec, spec.load_data()))
    assert lines["latent"].startswith("u ∈ ℝ^(1×3×3), z₄, z₃ ∈ ℝ^(1×2×2), z₂, z₁ ∈ ℝ^(1×4×4)   40 numbers")
    assert lines["joint"] == "p(x, z, u) = p(u) ∏ₗ p(zₗ | z₍>ₗ₎, u) p(x | z)"
    assert lines["prior"].startswith("p(u) = 100 steps of a denoiser from N(0, I),  γ from -7.0 to 7.0")
    assert lines["u"].startswith("r(u | x) = N(u; f(x), diag e^ρ),  f(x) = clip(DᵀxD / S, ±1)")
    assert lines["guide"].startswith("q(z, u | x) = r(u | x) ∏ₗ N(zₗ; μₗ, diag σₗ²)")
    assert (
        "E_q log p(x | z) − β [log r(u | x) − log p(u)] − β Σₗ KL(q(zₗ | z₍>ₗ₎, u, x)" in lines["objective"]
    )
    assert "log_variance_range -12 to -3" in lines["guide"]
    assert "scales 4:2-2:2" in lines["decoder"]


def test_a_plain_ladder_has_no_u() -> None:
    spec = load_spec("dvp-tiny", ["prior=none", "pseudoinput=none"])
    text = explain(spec, spec.load_data())
    lines = _lines_of(text)
    assert lines["joint"] == "p(x, z) = ∏ₗ p(zₗ | z₍>ₗ₎) p(x | z)"
    assert not re.search(r"\bu\b", text)
    assert "u" not in lines


def test_a_prior_of_pseudoinputs_is_one_of_u() -> None:
    spec = load_spec("dvp-tiny", ["prior=mixture"])
    text = explain(spec, spec.load_data())
    assert _lines_of(text)["prior"].startswith("p(u) = Σₖ πₖ N(u; mₖ, diag sₖ²)")
    assert "path of T" not in text


def test_the_cost_of_a_ladder_is_that_of_its_layers() -> None:
    """One latent on one plane of one pixel: the multiplications can be counted by hand."""
    small = ["decoder.scales=[[1,1]]", "decoder.channels=2", "decoder.postprocess=0", "encoder.stem=full"]
    spec = load_spec("dvp-tiny", ["prior=none", "pseudoinput=none", *small])
    up = 64 * 2 * 1 + 64 * (2 * 2 + 9 * 2 * 2 + 9 * 2 * 2 + 2 * 2)  # 1x1 from x, then one block at 8x8
    heads = 2 * (2 * 2 + 9 * 2 * 2 + 9 * 2 * 2 + 2 * 2)  # of q and p, two numbers from two channels,
    heads += 2 * (2 * 2)  # and the skip of either is the identity
    read = 64 * (1 * 2) + 64 * 9 * 2 * 1
    counted = (up + heads + read) / 1e6
    said = _lines_of(explain(spec, spec.load_data()))["cost"]
    assert float(said.split()[0]) == pytest.approx(counted, rel=0.03)


def test_two_levels_are_said_one_by_one() -> None:
    lines = _lines(
        _spec(
            "model=hvae",
            "posterior=hvae",
            "decoder=pair",
            "decoder.z_1_dim=4",
            "prior=vamp",
            "prior.components=5",
        )
    )
    assert lines["latent"] == "z₂ ∈ ℝ^3,  z₁ ∈ ℝ^4"
    assert lines["prior"].startswith("p(z₂) = 1/K Σₖ N(z₂; μ(uₖ), diag σ²(uₖ)),  K = 5")
    assert "KL(q(z₁ | x, z₂) ‖ p(z₁ | z₂))" in lines["objective"] or "log p(x | z)" in lines["objective"]


def test_labels_reach_the_jacobian() -> None:
    labels = ["model=conditional", "encoder.label_dim=4", "decoder.label_dim=4"]
    lines = _five(*labels)
    assert lines["guide"].startswith("q(z | x, y) = N(z; f(x, y), σ² f′(x, y) f′(x, y)ᵀ)")
    assert "SG[g′(f(x, y)) u]" in lines["loss"]
    assert "N(f(x, y), Σ)" in lines["judged by"]


def test_scales_that_a_prior_uses_are_trained() -> None:
    options = [
        "data.binarize=none",
        "data.dequantize=true",
        "likelihood=normal",
        "prior=vamp",
        "prior.components=2",
    ]
    counts = [
        num_parameters(spec.build(spec.load_data()))["encoder"]
        for spec in (_spec(*options), _spec(*options, "posterior=five"))
    ]
    assert counts == [361, 361]


def _aligned(*overrides: str, known: bool = True) -> list[str]:
    """The lines of an alignment, the heading taken off."""
    spec = _spec("posterior=normal", *overrides)
    text = explain(spec, spec.load_data() if known else None)
    lines = re.search(r"^alignment {3}(.*(?:\n {12}.*)*)", text, re.MULTILINE)
    assert lines is not None
    return re.split(r"\n {12}", lines[1])


def test_a_direct_alignment_is_said_symbol_by_symbol() -> None:
    said = [
        "− γ w h(s − (t − c))  at the factor z_align, added in training alone: no score has it",
        "h(r) = ½ r², linear beyond |r| = 1",
        "s = log p(z) at the draw of z that is decoded",
        "t = ρ",
        "ρ ± σ: the log-density of u by pak, u the 10 leading principal components of x, per length to the "
        "power of its intrinsic dimension by TWO-NN",
        "c = mean ρ − E log p(z) under p(z), so that entropies match",
        "w = 1 / σ², divided by its mean",
        "γ from 0 to 1 over the first 50 % of training",
    ]
    assert _aligned("align=direct") == said
    said[5] += "; 0 under a prior with parameters"
    assert _aligned("align=direct", known=False) == said
    # A prior with parameters takes the constant up.
    learned = _aligned("align=direct", "prior=mixture")
    assert learned == [said[0].replace("(t − c)", "t"), *said[1:5], *said[6:]]
    assert "alignment" not in explain(_spec("posterior=normal"), None)


def test_an_alignment_through_a_flow_names_what_gives_its_targets() -> None:
    options = ["align.dim=3", "align.flow_layers=4", "align.flow_hidden=7", "align.pretrain_steps=50"]
    said = _aligned("align=flow", *options)
    assert said[0].startswith("− γ w h(s − t)  at the factor z_align")
    assert said[3] == "t = ρ − log |det ∂g/∂u|"
    assert said[5] == (
        "g: ℝ³ → ℝ³, 4 affine couplings of width 7, maximises log p(z = g(u)) + log |det ∂g/∂u| by itself: "
        "adam at 0.001, a step before each of the model, 50 before the first"
    )
    assert "c is learned, from 0" in _aligned("align=flow", "align.offset=learn")
    assert "t = ρ − log |det ∂g/∂u|, the units of u left out" in _aligned(
        "align=flow", "align.preset=released"
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["preset=released"], "w = 1 / max(σ, 0.001)"),
        (["preset=released", "weight=precision"], "w = 1 / σ²"),
        (["preset=paper"], "s = E_q log p(z), in closed form for two normals, else by 16 fresh draws"),
        (["average=multi", "num_samples=1"], "s = E_q log p(z), by 1 fresh draw"),
        (["weight=none"], "w = 1"),
        (["weight=inverse", "floor=0.5", "normalize=false"], "w = 1 / max(√(σ² + 0.5²), 0.001)"),
        (["floor=0.5", "clip=0.9"], "w = 1 / (σ² + 0.5²), at most its 0.9 quantile, divided by its mean"),
        (["offset=-3.5"], "c = -3.5"),
        (["offset=learn"], "c is learned, from mean ρ − E log p(z) under p(z), so that entropies match"),
        (["delta=2.5"], "h(r) = ½ r², linear beyond |r| = 2.5"),
        (["gamma=0.3", "warmup=0.0"], "γ = 0.3"),
        (["gamma=0.3", "warmup=0.25"], "γ from 0 to 0.3 over the first 25 % of training"),
        (["gamma=0.0", "warmup=0.0"], "none, as γ = 0"),
        (["detach=guide"], "no gradient of it reaches the guide"),
        (
            ["estimator=kde", "projection=random", "dim=4"],
            "ρ ± σ: the log-density of u by kde, u the 4 random directions of x",
        ),
        (
            ["estimator=kstar", "unit=embedding", "dim=64"],
            "ρ ± σ: the log-density of u by kstar, u x itself, per length to the power of its width",
        ),
        (
            ["preset=released"],
            "− γ √(batch mean of w h(s − t))  at the factor z_align, added in training alone: no score has "
            "it",
        ),
    ],
)
def test_the_lines_of_an_alignment_follow_its_table(overrides: list[str], line: str) -> None:
    assert line in _aligned("align=direct", *(f"align.{override}" for override in overrides))


def test_a_known_density_is_that_of_the_data_or_of_their_plane() -> None:
    plane = ["data=gaussian_mixture", "data.num_train=64", "likelihood=normal", "z_dim=2", "align=flow"]
    said = _aligned(*plane, "align.estimator=exact")
    assert said[4] == "ρ ± σ: the known log-density of u, x itself"
    assert said[5].startswith("g: ℝ² → ℝ²")
    said = _aligned(*plane, "data=embedded_mixture", "data.num_train=64", "align.estimator=exact")
    assert said[4] == "ρ ± σ: the known log-density of u, the coordinates of x in its plane"
    assert said[5].startswith("g: ℝ² → ℝ²")


def test_an_alignment_sees_the_label_where_its_prior_does() -> None:
    said = _aligned("model=conditional", "prior=conditional_flow", "align=direct")
    assert said[2] == "s = log p(z | y) at the draw of z that is decoded"


def test_training_only_settings_are_said() -> None:
    settings = [
        "beta_warmup=5",
        "free_bits=0.5",
        "ema=0.99",
        "patience=3",
        "schedule=cosine",
        "objective=dreg",
    ]
    text = explain(_spec(*(f"fit.{s}" for s in settings), "fit.num_particles=3"), None)
    for words in (
        "adam at 0.001, batches of 128, 2 epochs, cosine schedule",
        "doubly reparameterised gradient",
        "β from 0 to 1 over 5 epochs",
        "KL below 0.5 nats free",
        "averaged weights (0.99)",
        "stops 3 epochs after the best on validation",
    ):
        assert words in text
    assert "7 steps" in explain(_spec("fit.steps=7"), None)


def test_limits_of_the_evaluation_are_said() -> None:
    lines = _lines(_spec("evaluate.limit=50", "evaluate.split=valid", "evaluate.num_particles=2000"))
    assert lines["judged by"].endswith("K = 2,000 on 50 of the valid data")


# Parts that stand in no spec without others.
LADDER = [
    *(f"{table}=ladder" for table in ("model", "posterior", "encoder", "decoder")),
    "decoder.scales=[[4,1],[2,1]]",
]
UNDER_U = [*LADDER, "prior=diffusion", "pseudoinput=dct", "pseudoinput.size=3"]
TWO_LEVELS = ["model=hvae", "posterior=hvae", "decoder=pair"]
COMPANY = {
    ("prior", "none"): LADDER,
    ("pseudoinput", "dct"): UNDER_U,
    ("pseudoinput", "downsampled"): UNDER_U,
    ("pseudoinput", "linear"): UNDER_U,
    **{(table, "ladder"): UNDER_U for table in ("posterior", "encoder", "decoder")},
    ("posterior", "hvae"): TWO_LEVELS,
    ("decoder", "pair"): TWO_LEVELS,
}


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        (table, kind)
        for table, kinds in PARTS.items()
        for kind in kinds
        if table != "model" and (table, kind) != ("pseudoinput", "none")
    ],
)
def test_every_part_can_be_said_with_and_without_data(table: str, kind: str) -> None:
    values = {"bernoulli": "binary", "categorical": "count", "poisson": "count", "negative_binomial": "count"}
    loaded = ["data.binarize=none", f"data.scale={'count' if values.get(kind) == 'count' else 'unit'}"]
    changes = [*COMPANY.get((table, kind), []), f"{table}={kind}"]
    changes += ["pseudoinput.size=3"] if table == "pseudoinput" else []
    changes += [*(loaded if table == "likelihood" and kind != "bernoulli" else [])]
    changes += {"codes": ["model=x_vae"]}.get(kind, [])
    changes += ["model=conditional"] if kind.startswith("conditional") else []
    spec = parse("[data]\nname = 'digits'\n[fit]\nepochs = 2\n", ["z_dim=12", *changes])
    data = spec.load_data()
    said, unsaid = explain(spec, data), explain(spec, None)
    heading = {"posterior": "guide", "pseudoinput": "u "}.get(table, table)
    for text in (said, unsaid):
        assert len([line for line in text.splitlines() if line.startswith(heading)]) == 1
        assert not re.search(r"\{[a-z_]+\}|None", text)
    assert ("ℝ¹²" in said) == (spec.model.kind != "ladder")
    assert "parameters  " in said
    assert "parameters  " not in unsaid


def test_tables_of_numbers_live_in_a_plain_space() -> None:
    spec = _spec("data=two_moons", "data.num_train=32", "likelihood=normal")
    assert _lines(spec)["data"].startswith("x ∈ ℝ²   two_moons")


def test_numbers_of_parameters_count_shared_modules_once() -> None:
    spec = _spec("prior=vamp", "prior.components=2")
    counts = num_parameters(spec.build(spec.load_data()))
    assert counts == {"prior": 128, "decoder": 336, "encoder": 361, "in all": 825}


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["fit.objective=iwae"], "with one particle 'iwae' is the ELBO"),
        (["fit.objective=mean_field", "prior=mixture"], "has no closed form here"),
        (["fit.objective=mean_field", "posterior=flow"], "has no closed form here"),
        (["fit.objective=mean_field", "posterior=full_covariance"], "has no closed form here"),
        (
            ["prior=vamp", "prior.components=3", "posterior=flow"],
            "the vamp prior mixes the encoder's diagonal",
        ),
        (
            ["model=x_vae", "prior=codes", "prior.variant=gmm", "prior.kl=nearest"],
            r"prior\.kl = 'nearest' enters the objective 'mean_field' alone, not 'elbo'",
        ),
        (["posterior=five"], "the noise of the posterior is that of bits at f"),
        (["posterior=laplace"], "an approximation, not the paper's"),
        (
            [
                "data=saddle",
                "data.num_train=256",
                "likelihood=normal",
                "posterior=five",
                "fit.beta_warmup=1",
                "z_dim=2",
            ],
            "supposes that log q",
        ),
        (["data.binarize=none", "likelihood=normal"], r"log p\(x\) is a density on \[0, 1\]"),
        (
            ["data.binarize=none", "data.scale=count", "likelihood=normal"],
            r"log p\(x\) is a density on the line",
        ),
    ],
)
def test_notes(overrides: list[str], note: str) -> None:
    assert re.search(note, _lines(_spec(*overrides))["note"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["fit.objective=mean_field"],
        ["fit.objective=iwae", "fit.num_particles=2"],
        ["prior=vamp", "prior.components=3"],
        ["fit.objective=mean_field", "model=x_vae", "prior=codes", "prior.variant=gmm", "prior.kl=nearest"],
        ["data.binarize=none", "likelihood=discretized_logistic_mixture"],
        ["data=saddle", "data.num_train=256", "likelihood=normal", "posterior=five", "z_dim=2"],
    ],
)
def test_no_note_without_a_surprise(overrides: list[str]) -> None:
    assert "note" not in _lines(_spec(*overrides))
