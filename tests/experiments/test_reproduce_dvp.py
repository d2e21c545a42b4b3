"""DVP-VAE's study and that of the usual evaluation: what differs between cells, and figures against truth."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from typer.testing import CliRunner

from pvae.data import Data, load
from pvae.distributions import Diffusion
from pvae.evaluation import log_likelihood, nested_likelihood
from pvae.experiments.cli import app
from pvae.experiments.program import Program
from pvae.experiments.reproduce import Cell, Context, Ledger, Record
from pvae.experiments.reproduce.dvp import _CHANGES, _MNIST, DVPStudy, _layer_names
from pvae.experiments.reproduce.overstated import log_prob_on_grid, overstated
from pvae.experiments.reproduce.overstatement import (
    OverstatementStudy,
    gaps,
    log_mean_exp,
    optimal_noise,
    with_closed_kl,
)
from pvae.experiments.spec import load_spec
from pvae.inference import fit
from pvae.priors import DiffusionPrior
from pvae.testing import LinearGaussianVAE

STUDY, OTHER = DVPStudy(), OverstatementStudy()
T_2 = 4.302652729911275  # 97.5 % point of Student's t with two degrees of freedom, from a printed table
# Variance, entropy, then gaps of continuous time, of T = 25, 50, 100 and 1000 steps, and of the authors'
# density with T = 25 and 50, as another program had them.
GAPS = (
    (1.0, 1.4189, 0.0012, (0.7663, 0.3535, 0.1704, 0.0176), (-0.1283, -0.0635)),
    (0.05, -0.0789, 0.0242, (0.3380, 0.1704, 0.0948, 0.0310), (-0.0992, -0.0376)),
    (0.01, -0.8836, 0.1107, (0.2282, 0.1665, 0.1379, 0.1134), (0.0083, 0.0591)),
)


def cells_of(scale: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in STUDY.cells(STUDY.scales[scale])}


def record(model: str, change: str = "as-is", seed: int = 0, **metrics: float) -> Record:
    factors = {"data": "digits", "model": model, "change": change}
    return Record(
        study="dvp",
        scale="smoke",
        cell="/".join([*factors.values(), str(seed)]),
        key="k",
        factors=factors,
        seed=seed,
        metrics=dict(metrics),
        failure=None if metrics else "diverged",
        protocol={"name": "digits", "hash": "abc"},
        settings={"num_data": 10},
        seconds=1.0,
        environment={},
    )


def flat(spec: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in spec.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class TestCells:
    def test_models_see_the_same_data_batches_and_epochs(self) -> None:
        cells = [cell for cell in cells_of("cpu").values() if cell.factors["change"] == "as-is"]
        for name, seeds, models in (("mnist", (0, 1), 6), ("digits", (0, 1, 2), 3)):
            of = [cell for cell in cells if cell.factors["data"] == name]
            assert len(of) == len(seeds) * models
            specs = {(cell.factors["model"], cell.seed): cell.spec() for cell in of}
            assert {seed for _, seed in specs} == set(seeds)
            data = [spec.data.model_dump() for spec in specs.values()]
            assert all(one == data[0] for one in data)
            settings = {key: spec.fit.arguments() for key, spec in specs.items()}
            assert {one["batch_size"] for one in settings.values()} == {100 if name == "mnist" else 64}
            epochs = {key[0]: one["epochs"] for key, one in settings.items()}
            usual = epochs["dvp"]
            longer = epochs.pop("vae-time", usual)
            assert set(epochs.values()) == {usual}
            assert longer >= usual

    def test_the_ladder_is_the_same_network_without_u(self) -> None:
        cells = cells_of("cpu")
        for data in ("mnist", "digits"):
            one, other = (
                dict(flat(cells[f"{data}/{model}/as-is/0"].spec().model_dump()))
                for model in ("dvp", "ladder")
            )
            differ = {
                key.split(".")[0] for key in one.keys() | other.keys() if one.get(key) != other.get(key)
            }
            assert differ == {"prior", "pseudoinput"}

    def test_a_change_is_one_thing(self) -> None:
        cells = cells_of("cpu")
        found = {}
        for change, changed in _CHANGES.items():
            for model in changed.models:
                specs = [
                    dict(flat(cells[f"digits/{model}/{name}/0"].spec().model_dump()))
                    for name in ("as-is", change)
                ]
                keys = specs[0].keys() & specs[1].keys()
                found[change] = sorted(key for key in keys if specs[0][key] != specs[1][key])
        assert found.pop("downsampled") == found.pop("linear") == ["pseudoinput.kind"]
        assert found.pop("u-normal") == found.pop("u-mixture") == ["prior.kind"]
        assert found == {
            "no-aggregate": ["decoder.aggregate"],
            "postprocess-0": ["decoder.postprocess"],
            **{f"size-{size}": ["pseudoinput.size"] for size in (2, 4, 5)},
            **{f"gamma-{end}": ["prior.gamma_min"] for end in (5, 9)},
            "narrow-range": ["posterior.log_variance_range"],
        }
        sizes = {cells[f"digits/dvp/{name}/0"].spec().pseudoinput.size for name in ("downsampled", "linear")}  # type: ignore[attr-defined]
        assert sizes == {cells["digits/dvp/as-is/0"].spec().pseudoinput.size}  # type: ignore[attr-defined]

    def test_the_warm_up_is_as_large_a_share_as_in_the_recipe(self) -> None:
        for name, model in _MNIST.items():
            own = load_spec(model.recipe, model.overrides).fit.arguments()
            here = cells_of("cpu")[f"mnist/{name}/as-is/0"].spec().fit.arguments()
            share = own["beta_warmup"] / own["epochs"]
            assert here["beta_warmup"] / here["epochs"] == pytest.approx(share)
        own = load_spec("dvp-tiny").fit.arguments()
        here = cells_of("cpu")["digits/dvp/as-is/0"].spec().fit.arguments()
        assert here["beta_warmup"] / here["epochs"] == pytest.approx(own["beta_warmup"] / own["epochs"])

    def test_every_cell_can_be_built(self) -> None:
        data = load("digits", binarize="dynamic")
        for cell in cells_of("cpu").values():
            if cell.factors["data"] == "digits" and cell.seed == 0:
                model = cell.spec().build(data).model
                prior = cell.spec().prior.kind
                assert isinstance(getattr(model, "prior", None), DiffusionPrior) == (prior == "diffusion")


def trained(*overrides: str) -> tuple[Program, Data]:
    """A small DVP-VAE or ladder, trained for long enough that its bounds differ."""
    small = ("decoder.channels=4", "fit.steps=40", "fit.beta_warmup=0", *overrides)
    spec = load_spec("dvp-tiny", small)
    data = load("digits", binarize="dynamic")
    program = spec.build(data)
    fit(*program, data.train, **spec.fit.arguments(), progress=False)
    return program, data


class TestOverstated:
    def test_of_one_particle_is_the_elbo_of_a_plain_ladder(self) -> None:
        program, data = trained("prior=none", "pseudoinput=none")
        split = data.test[:32]
        found = overstated(program, split, num_particles=100)
        proper = log_likelihood(*program, split, num_particles=100, progress=False)
        # Ratios at the draws are proper weights; closed forms have their mean and none of their noise.
        assert float(found.elbo.mean()) == pytest.approx(proper.elbo, abs=0.3)
        error = math.sqrt(2) * proper.monte_carlo_error
        assert float(found.log_prob_sampled.mean()) == pytest.approx(proper.mean, abs=5 * error)
        assert found.log_prob.shape == found.reconstruction.shape == (32,)
        assert (found.log_prob >= found.elbo).all()
        assert float((found.reconstruction - found.elbo).min()) > 0  # KLs are positive

    def test_of_a_diffusion_is_above_every_bound(self) -> None:
        program, data = trained("prior.hidden=16", "prior.num_steps=20", "prior.gamma_min=-6.0")
        split = data.test[:32]
        bound = nested_likelihood(*program, split, num_particles=20, num_draws=2, progress=False).mean
        full = log_likelihood(*program, split, num_particles=50, progress=False).mean
        found = overstated(program, split, num_particles=50, num_steps=25)
        assert float(found.log_prob.mean()) > max(bound, full) + 1

    def test_leaves_draws_to_the_seed(self) -> None:
        program, data = trained("prior.hidden=16", "prior.num_steps=3", "fit.steps=2")
        one, same, other = (
            overstated(program, data.test[:3], num_particles=4, num_steps=2, seed=seed).log_prob
            for seed in (0, 0, 1)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


class TestDensityOnAGrid:
    @pytest.mark.parametrize("variance", [1.0, 0.05])
    def test_has_the_exact_expectation(self, variance: float) -> None:
        torch.manual_seed(0)
        p = optimal_noise(variance, (2, 3), 25)
        truth = stats.norm(scale=variance**0.5)
        u = torch.from_numpy(truth.rvs((20_000, 2, 3), random_state=1))
        gap = truth.logpdf(u.numpy()).sum((1, 2)) - log_prob_on_grid(p, u, 25).numpy()
        error = gap.std() / math.sqrt(len(gap))
        assert gap.mean() == pytest.approx(6 * gaps(variance, 25)["grid"], abs=4 * error)
        assert error < 0.05

    def test_of_many_steps_is_the_bound_in_continuous_time(self) -> None:
        p = optimal_noise(0.05, (4,), 1000)
        bound = Diffusion(p.denoise, p.schedule, (4,), "vlb", 1000, 500, prediction="eps")
        torch.manual_seed(0)
        u = torch.full((4000, 4), 0.3, dtype=torch.float64)
        one, other = log_prob_on_grid(p, u, 1000), bound.log_prob(u)
        error = float((one.var() + other.var()).sqrt()) / math.sqrt(4000)
        assert float(one.mean() - other.mean()) == pytest.approx(0.0, abs=4 * error + 0.02)

    def test_takes_either_prediction(self) -> None:
        p = optimal_noise(0.5, (3,), 10)

        def velocity(y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
            alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
            return (p.denoise(y, gamma) - sigma * y) / alpha

        turned = Diffusion(velocity, p.schedule, (3,), num_steps=10, prediction="v")
        u = torch.randn(5, 3, dtype=torch.float64)
        found = []
        for one in (p, turned):
            torch.manual_seed(3)
            found.append(log_prob_on_grid(one, u, 10))
        assert torch.allclose(found[0], found[1])


class TestGaps:
    @pytest.mark.parametrize(("variance", "entropy", "continuous", "steps", "grid"), GAPS)
    def test_are_those_of_the_table(
        self,
        variance: float,
        entropy: float,
        continuous: float,
        steps: tuple[float, ...],
        grid: tuple[float, ...],
    ) -> None:
        assert stats.norm(scale=variance**0.5).entropy() == pytest.approx(entropy, abs=6e-5)
        assert gaps(variance, 25)["continuous"] == pytest.approx(continuous, abs=6e-5)
        for count, wanted in zip((25, 50, 100, 1000), steps, strict=True):
            assert gaps(variance, count)["steps"] == pytest.approx(wanted, abs=6e-5)
        for count, wanted in zip((25, 50), grid, strict=True):
            assert gaps(variance, count)["grid"] == pytest.approx(wanted, abs=6e-5)

    def test_of_a_wider_schedule(self) -> None:
        ends = (-10.0, 7.0)
        found = [gaps(0.05, steps, ends) for steps in (25, 100, 1000)]
        assert found[0]["continuous"] == pytest.approx(0.0005, abs=6e-5)
        assert [one["steps"] for one in found] == pytest.approx([1.2710, 0.2695, 0.0261], abs=6e-5)

    def test_calibrated_steps_cost_what_continuous_time_does(self) -> None:
        for variance, steps in itertools.product((1.0, 0.05), (3, 25)):
            found = gaps(variance, steps)
            assert found["calibrated"] == pytest.approx(found["continuous"], abs=1e-10)

    def test_the_integral_is_that_of_quadrature(self) -> None:
        def mse(gamma: float) -> float:
            signal = 0.05 * math.exp(-gamma)
            return signal / (1 + signal)

        between = 0.5 * integrate.quad(mse, -6, 7)[0]
        found = [gaps(0.05, steps)["grid"] for steps in (10, 100_000)]
        assert found[1] - gaps(0.05, 1)["continuous"] == pytest.approx(0, abs=1e-4)
        ends = gaps(0.05, 1)["continuous"] - between
        grid = np.linspace(-6, 7, 11)[1:]
        assert found[0] == pytest.approx(ends + 0.5 * 1.3 * sum(map(mse, grid)))

    def test_the_chain_has_them(self) -> None:
        torch.manual_seed(1)
        p = optimal_noise(0.05, (4,), 7)
        u = 0.05**0.5 * torch.randn(40_000, 4, dtype=torch.float64)
        plain = Diffusion(p.denoise, p.schedule, (4,), "chain", 7, prediction="eps")
        log_p = stats.norm(scale=0.05**0.5).logpdf(u.numpy()).sum(-1)
        for one, name in ((p, "calibrated"), (plain, "steps")):
            gap = log_p - one.log_prob(u).numpy()
            error = gap.std() / math.sqrt(len(gap))
            assert gap.mean() == pytest.approx(4 * gaps(0.05, 7)[name], abs=4 * error)


class TestClosedKL:
    def test_exceeds_the_truth_where_proper_weights_do_not(self) -> None:
        weight = torch.from_numpy(np.random.default_rng(0).normal(size=(100, 20)) / math.sqrt(20))
        oracle = LinearGaussianVAE(100, 20, 1.0, weight=weight, bias=torch.zeros(100))
        torch.manual_seed(0)
        x = oracle.model.sample(60)
        exact = oracle.log_prob(x)
        for guide, wanted in ((oracle.exact_guide, 3.15), (oracle.mean_field_guide, 2.5)):
            q, loc = guide.posterior(x), guide.loc(x)
            scale = guide.scale.detach()
            covariance = scale @ scale.T if scale.ndim == 2 else scale.square().diag()
            with torch.no_grad():
                z = q.sample((1000,))
                proper, closed = with_closed_kl(oracle.model.decode(z).log_prob(x), q, z, loc, covariance)
            above = log_mean_exp(closed, 1000) - exact
            assert float(above.mean()) == pytest.approx(wanted, abs=0.25)
            below = log_mean_exp(proper, 1000) - exact
            assert float(below.mean()) < 4 * float(below.std()) / math.sqrt(60) + 1e-9
            # With one particle both have the mean of the ELBO.
            elbo = oracle.guide_elbo(guide, x).detach()
            for log_w in (proper, closed):
                gap = log_mean_exp(log_w, 1) - elbo
                assert float(gap.mean()) == pytest.approx(0, abs=4 * float(gap.std()) / math.sqrt(60) + 1e-9)

    def test_a_log_mean_exp_of_blocks(self) -> None:
        log_w = torch.randn(7, 3, dtype=torch.float64)
        parts = [np.log(np.exp(log_w[i : i + 3].numpy()).mean(0)) for i in (0, 3)]
        assert np.allclose(log_mean_exp(log_w, 3).numpy(), np.mean(parts, 0))


class TestTables:
    def test_claims_are_judged_by_their_interval(self) -> None:
        rows = {"dvp": (-90.0, -90.5, -91.0), "ladder": (-91.0, -91.6, -91.9), "vae": (-89.0, -92.0, -91.0)}
        records = [
            record(name, seed=seed, elbo=value - 1, iwae=value)
            for name, values in rows.items()
            for seed, value in enumerate(values)
        ]
        text = "\n".join(STUDY.tables(records))
        gains = (1.0, 1.1, 0.9)
        half = T_2 * float(np.std(gains, ddof=1)) / math.sqrt(3)
        assert f"| DVP-VAE > ladder | 1.00 ± {half:.2f}: yes | 1.00 ± {half:.2f}: yes |" in text
        vae = next(line for line in text.splitlines() if line.startswith("| DVP-VAE > VAE |"))
        assert vae.count("open") == 2

    def test_layers_stand_from_the_top(self) -> None:
        names = ("z", "z_1", "u", "z_10", "z_2")
        records = [replace(record("dvp"), metrics={f"kl/{name}": 1.0 for name in names})]
        assert _layer_names(records) == ["u", "z_10", "z_2", "z_1", "z"]

    def test_changes_are_compared_within_a_model(self) -> None:
        records = [
            record(model, change, iwae=value)
            for (model, change), value in {
                ("dvp", "as-is"): -90.0,
                ("dvp", "no-aggregate"): -92.0,
                ("ladder", "as-is"): -91.0,
                ("ladder", "no-aggregate"): -91.5,
            }.items()
        ]
        text = "\n".join(STUDY.tables(records))
        lines = [line for line in text.splitlines() if line.startswith(("| DVP-VAE | no", "| ladder | no"))]
        assert any(" -2 " in line for line in lines)
        assert any(" -0.5 " in line for line in lines)


def test_the_study_runs_and_reports(tmp_path: Path) -> None:
    arguments = ["reproduce", "dvp", "--scale", "smoke", "--out", str(tmp_path)]
    for only in ("dvp/as-is", "size-2", "ladder/as-is", "vae-time", "u-mixture"):
        done = CliRunner().invoke(app, [*arguments, "--only", only])
        assert done.exit_code == 0, done.output
    records = {record.cell: record for record in Ledger(tmp_path).read()}
    assert [one.failure for one in records.values()] == [None] * 5
    metrics = records["digits/dvp/as-is/0"].metrics
    numbers = {name: value for name, value in metrics.items() if value is not None}
    kl = {name: numbers[f"kl/{name}"] for name in ("u", "z_4", "z_3", "z_2", "z_1")}
    assert numbers["rate"] == pytest.approx(sum(kl.values()))
    assert kl["u"] == numbers["rate_u"]
    assert (numbers["calibrated"], numbers["num_steps"], numbers["units"]) == (1, 4, 40)
    assert numbers["code_above"] == pytest.approx(numbers["code"] - numbers["iwae"])
    assert numbers["code_elbo_above"] == pytest.approx(numbers["code_elbo"] - numbers["elbo"])
    assert numbers["nested"] >= numbers["elbo"]
    for cell, name in (("dvp/u-mixture", "nested"), ("vae-time/as-is", "code"), ("ladder/as-is", "rate_u")):
        assert name not in records[f"digits/{cell}/0"].metrics
    text = (tmp_path / "tables.md").read_text()
    assert "The authors' procedure is no bound" in text
    assert "| DVP-VAE | u: 2×2 |" in text  # noqa: RUF001
    names = {path.stem.split("-", 2)[-1] for path in (tmp_path / "figures").iterdir()}
    assert names == {"models", "layers", "size"}


def test_the_other_study_runs_and_reports(tmp_path: Path) -> None:
    for only in ("linear-gaussian", "T25"):
        arguments = ["--scale", "smoke", "--out", str(tmp_path), "--only", only]
        done = CliRunner().invoke(app, ["reproduce", "overstatement", *arguments])
        assert done.exit_code == 0, done.output
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 2 + 3
    records = {one["cell"]: one["metrics"] for one in map(json.loads, lines)}
    exact = records["linear-gaussian/exact/0"]
    assert exact["proper_1"] == pytest.approx(0, abs=1e-9)
    assert exact["closed_10"] > 1
    drawn = records["gaussian-u/s1/T25/0"]
    assert drawn["grid_10"] > drawn["grid_1"] > drawn["chain_1"]
    assert len(list((tmp_path / "figures").iterdir())) == 2


def test_a_cell_of_the_other_study_finds_the_expectations(tmp_path: Path) -> None:
    scale = OTHER.scales["smoke"]
    cell = next(cell for cell in OTHER.cells(scale) if cell.name == "gaussian-u/s0.05/T25/0")
    large = replace(scale, num_particles=100, num_passes=100 * 25 * 30)  # type: ignore[call-arg]
    metrics = OTHER.run(cell, Context(tmp_path, large, torch.device("cpu"))).metrics
    found = {name: value for name, value in metrics.items() if value is not None}
    for name, tolerance in (("grid", 0.8), ("chain", 0.5)):
        assert found[f"{name}_1"] == pytest.approx(found[f"{name}_expected"], abs=tolerance)
        assert found[f"{name}_1"] < found[f"{name}_10"] < found[f"{name}_100"]
    assert found["chain_100"] < 0.5
    assert found["grid_100"] > 10
