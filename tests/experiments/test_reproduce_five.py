"""FIVE's study: its cells, what one measures, and what the tables say of them."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from typer.testing import CliRunner

from pvae import canvas
from pvae.data import from_tensors, load
from pvae.experiments.cli import app
from pvae.experiments.program import Program
from pvae.experiments.reproduce import Cell, Context, Ledger, Record
from pvae.experiments.reproduce.five import (
    _GUIDES,
    FiveStudy,
    _by_budget,
    _covariances,
    _diagonal_gap,
    _jacobian,
    step_seconds,
)
from pvae.experiments.reproduce.plots import Trend, trends
from pvae.experiments.reproduce.tables import interval
from pvae.experiments.spec import load_spec
from pvae.guides import FiveGuide, NormalGuide, laplace_proposal
from pvae.models import VAE
from pvae.nn import MLPEncoder
from pvae.priors import StandardNormal

from ..guides.five import linear_pair

STUDY = FiveStudy()
T_2 = 4.302652729911275  # 97.5 % point of Student's t with two degrees of freedom, from a printed table


def cells_of(scale: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in STUDY.cells(STUDY.scales[scale])}


def record(
    guide: str,
    z_dim: int,
    better: float | None = None,
    *,
    seed: int = 0,
    budget: str = "steps",
) -> Record:
    """A cell with given bounds, or one that diverged."""
    metrics = {"iwae_better": better, "iwae_laplace": better, "iwae_own": better, "active_laplace": 2.0}
    factors = {"data": "digits", "budget": budget, "guide": guide, "z_dim": f"d{z_dim}"}
    return Record(
        study="five",
        scale="smoke",
        cell="/".join([*factors.values(), str(seed)]),
        key="k",
        factors=factors,
        seed=seed,
        metrics={} if better is None else metrics,
        failure="diverged" if better is None else None,
        protocol={"name": "digits", "hash": "abc"},
        settings={"num_data": 10},
        seconds=1.0,
        environment={},
    )


def test_cells_of_every_budget() -> None:
    cells = cells_of("cpu")
    long = [name for name, cell in cells.items() if cell.factors["budget"].startswith("long")]
    assert list(cells)[-len(long) :] == long
    seeds = [cell.seed for name, cell in cells.items() if name not in long]
    assert (len(seeds), len(long)) == (120, 9)
    assert seeds == sorted(seeds)
    sizes = {
        (name, budget): sorted(
            int(cell.factors["z_dim"][1:])
            for cell in cells.values()
            if cell.factors["guide"] == name
            and cell.factors["budget"] == budget
            and (cell.seed, cell.factors["data"]) == (0, "mnist")
        )
        for name, budget in itertools.product(_GUIDES, ("steps", "time"))
    }
    for name in ("diagonal", "full", "fif", "five"):
        assert sizes[name, "steps"] == [2, 8, 16, 32, 64]
    for name in ("diagonal", "full", "fif", "laplace"):
        assert sizes[name, "time"] == [8, 64]
    assert sizes["laplace", "steps"] == [2, 8]
    assert sizes["five-data", "steps"] == [16, 64]
    assert not sizes["five", "time"]


def test_equal_time_is_equal_cost() -> None:
    for cell in cells_of("cpu").values():
        steps, z_dim = cell.spec().fit.arguments()["steps"], int(cell.factors["z_dim"][1:])
        whole = {"mnist": 2000, "cifar10": 1500}[cell.factors["data"]]
        budget = cell.factors["budget"]
        whole *= 5 if budget.startswith("long") else 1
        if not budget.endswith("time"):
            assert steps == whole
        else:
            spent = steps * _GUIDES[cell.factors["guide"]].cost(z_dim)
            assert spent == pytest.approx(whole * _GUIDES["five"].cost(z_dim), rel=0.01)


def test_a_guide_costs_what_was_measured_at_the_next_size() -> None:
    laplace = _GUIDES["laplace"]
    assert [laplace.cost(d) for d in (1, 2, 3, 8)] == [laplace.costs[d] for d in (2, 2, 8, 8)]
    assert laplace.cost(128) == laplace.costs[64]


@pytest.mark.parametrize("scale", ["smoke", "cpu", "full"])
def test_a_cell_depends_on_nothing_that_its_recipe_may_change(scale: str) -> None:
    """Another recipe with the same changes is the same training."""
    for cell in cells_of(scale).values():
        if cell.seed == 0:
            ours, *others = (
                load_spec(recipe, [*cell.overrides, "fit.seed=0"]).model_dump(
                    exclude={"description", "evaluate"}
                )
                for recipe in (cell.recipe, "vae-mnist", "vae")
            )
            assert all(other == ours for other in others), cell.name


def test_guides_differ_in_the_posterior_alone() -> None:
    specs = {
        cell.factors["guide"]: cell.spec().model_dump(exclude={"description"})
        for cell in cells_of("smoke").values()
        if cell.factors["budget"] == "steps" and cell.factors["z_dim"] == "d8"
    }
    posteriors = {name: spec.pop("posterior") for name, spec in specs.items()}
    assert len(specs) == 5
    assert all(spec == specs["diagonal"] for spec in specs.values())
    assert [posteriors[name]["kind"] for name in ("diagonal", "full")] == ["normal", "full_covariance"]
    tied = {name: (p["objective"], p["probe"]) for name, p in posteriors.items() if p["kind"] == "five"}
    assert tied == {"fif": ("fif", "latent"), "five": ("five", "latent"), "five-data": ("five", "data")}


def test_the_gap_of_a_diagonal_is_its_smallest_divergence() -> None:
    torch.manual_seed(0)
    root = torch.randn(5, 4, 4, dtype=torch.float64)
    p = MultivariateNormal(torch.zeros(4, dtype=torch.float64), root @ root.mT + 0.1 * torch.eye(4))
    best = 1 / p.precision_matrix.diagonal(dim1=-2, dim2=-1)

    def divergence(variance: Tensor) -> Tensor:
        return kl_divergence(MultivariateNormal(p.loc, torch.diag_embed(variance)), p)

    gap = _diagonal_gap(p.scale_tril)
    assert torch.allclose(gap, divergence(best), atol=1e-9)
    for step in (0.01, 0.3):
        assert (divergence(best * (step * torch.randn(200, 5, 4)).exp()) >= gap).all()


def linear_program(sigma: float) -> tuple[Program, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A linear pair whose third latent the decoder ignores, and its matrices."""
    a = torch.tensor([[0.5, 0.1, 0.0, 0.2], [0.0, 0.4, 0.3, 0.0], [0.1, 0.0, 0.0, 0.3]])
    w = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.3, 0.0, 0.0], [0.0, 0.2, 0.0]])
    encoder, decoder, likelihood = linear_pair(a, w, sigma)
    model = VAE(StandardNormal(3), decoder, likelihood)
    return Program(model, FiveGuide(encoder, decoder, likelihood)), a.double().numpy(), w.double().numpy()


def test_covariances_of_a_linear_pair() -> None:
    sigma = 0.5
    program, a, w = linear_program(sigma)
    split = from_tensors(torch.randn(130, 4, generator=torch.Generator().manual_seed(1))).train
    found = _covariances(program.guide, laplace_proposal(*program), split)
    precision = np.eye(3) + w.T @ w / sigma**2
    own = np.linalg.inv(sigma**2 * a @ a.T)
    for name, matrix in (("laplace", precision), ("own", own)):
        gap = 0.5 * (np.log(np.diag(matrix)).sum() - np.linalg.slogdet(matrix)[1])
        assert found[f"diagonal_gap_{name}"] == pytest.approx(gap, abs=1e-5)
    assert found["log_det_laplace"] == pytest.approx(-0.5 * np.linalg.slogdet(precision)[1], abs=1e-5)
    assert found["active_laplace"] == 2


def test_a_diagonal_guide_loses_nothing_on_itself() -> None:
    program, _, _ = linear_program(0.5)
    model: Any = program.model
    torch.manual_seed(0)
    diagonal = NormalGuide(MLPEncoder((4,), 3, (8,), "silu"))
    split = from_tensors(torch.randn(7, 4)).train
    found = _covariances(diagonal, laplace_proposal(model, diagonal), split)
    assert found["diagonal_gap_own"] == 0.0
    assert (found["diagonal_gap_laplace"] or 0) > 0.01


def test_jacobians_are_compared_for_any_guide() -> None:
    program, a, w = linear_program(0.5)
    split = from_tensors(torch.randn(7, 4)).train
    found = _jacobian(program, split)
    assert found["health"] == pytest.approx(float(np.trace(a @ w)) / 3, abs=1e-5)
    half_log_det = 0.5 * np.linalg.slogdet(0.25 * a @ a.T)[1]
    assert found["half_log_det"] == pytest.approx(half_log_det, abs=1e-4)


def test_five_shares_its_cells_with_the_budget_of_time() -> None:
    records = [
        record("five", 8),
        record("diagonal", 8, budget="time"),
        record("five", 2),
        record("diagonal", 8),
        record("diagonal", 2),
    ]
    budgets = {
        budget: [(r.factors["guide"], r.factors["z_dim"]) for r in cells]
        for budget, cells in _by_budget(records).items()
    }
    assert budgets == {
        "steps": [("diagonal", "d2"), ("five", "d2"), ("diagonal", "d8"), ("five", "d8")],
        "time": [("diagonal", "d8"), ("five", "d8")],
    }
    assert all(r.factors["budget"] == budget for budget, cells in _by_budget(records).items() for r in cells)


def test_claims_are_judged_by_their_interval() -> None:
    gains = {2: (1.0, 2.0, 3.0), 8: (5.0, 6.0, 10.0), 16: (-9.0, -9.1, -9.2)}
    records = [
        r
        for (z_dim, values), seed in itertools.product(gains.items(), range(3))
        for r in (
            record("diagonal", z_dim, 100.0 * seed, seed=seed),
            record("five", z_dim, 100.0 * seed + values[seed], seed=seed),
        )
    ]
    text = "\n".join(STUDY.tables(records))
    # Gains of 1, 2 and 3: mean 2, standard deviation 1; of 5, 6 and 10: mean 7, standard deviation sqrt(7).
    assert T_2 / math.sqrt(3) > 2
    assert "| FIVE > diagonal | 2 | 2.0 ± 2.5: open | 2.0 ± 2.5: open | 2.0 ± 2.5: open |" in text
    assert "| FIVE > diagonal | 8 | 7.0 ± 6.6: yes |" in text
    assert "| FIVE > diagonal | 16 | -9.10 ± 0.25: no |" in text
    # From 2 to 8 each seed's gain grows by 4, 4 and 7.
    assert "| 2 to 8 | 5.0 ± 4.3: yes |" in text
    assert sum(line.startswith("| 8 to 16 |") for line in text.splitlines()) == 1
    assert "FIVE > FIF" not in text


def test_a_claim_from_one_seed_has_no_verdict() -> None:
    text = "\n".join(STUDY.tables([record("diagonal", 2, 1.0), record("five", 2, 4.0)]))
    assert "| FIVE > diagonal | 2 | 3 | 3 | 3 |" in text


def test_tables_and_figures_of_an_unfinished_study(tmp_path: Path) -> None:
    diverged = record("five", 8)
    records = [
        record("diagonal", 2, 1.0),
        record("full", 2, 2.0, budget="time"),
        diverged,
    ]
    text = "\n".join(STUDY.tables(records))
    assert "| FIVE | – | – |" in text  # noqa: RUF001
    assert "nan" not in text
    assert [path.name for path in STUDY.figures(records, tmp_path / "a", "A")] == [
        "a-bounds.png",
        "a-latents.png",
        "a-time.png",
    ]
    assert STUDY.figures([record("full", 2, 2.0, budget="time")], tmp_path / "b", "B") == []


def test_trends_draw_means_and_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def keep(figure: Any, path: Path, title: str) -> Path:
        drawn.append(figure)
        return path

    monkeypatch.setattr(canvas, "save", keep)
    value, alone, nothing = interval([1.0, 2.0, 6.0]), interval([5.0]), interval([None])
    lines = [Trend("one", [(2, value), (8, nothing), (16, alone)]), Trend("none", [(2, nothing)])]
    trends({"left": lines, "right": lines[:1]}, tmp_path / "a.png", across="size", ticks=[2, 8, 16])
    (figure,) = drawn
    left, right = figure.axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["2", "8", "16"]
    (container,) = left.containers
    assert container[0].get_xydata().tolist() == [[2.0, 3.0], [16.0, 5.0]]
    (bars,) = container[2]
    half = T_2 * math.sqrt(7 / 3)
    assert np.allclose(bars.get_segments()[0], [[2, 3 - half], [2, 3 + half]])
    assert np.allclose(bars.get_segments()[1], [[16, 5], [16, 5]])
    assert right.get_title(loc="left") == "right"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one"]


def test_steps_are_timed_guide_by_guide() -> None:
    overrides = ["z_dim=16", "encoder.hidden=[16]", "decoder.hidden=[16]"]
    found = step_seconds(
        overrides,
        ("diagonal", "laplace"),
        data=load("digits", binarize="none", dequantize=True),
        rounds=1,
        steps=15,
    )
    assert set(found) == {"diagonal", "laplace"}
    assert 0 < found["diagonal"] < found["laplace"] < 1


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study at the smallest scale, run by the command."""
    folder = tmp_path_factory.mktemp("five")
    result = CliRunner().invoke(
        app, ["reproduce", "five", "--scale", "smoke", "--out", str(folder), "--json"]
    )
    assert result.exit_code == 0, result.output
    files = [Path(path) for path in json.loads(result.stdout)["files"]]
    assert [path.suffix for path in files] == [".md", ".png", ".png", ".png"]
    assert all(path.is_file() for path in files)
    return folder


def test_smoke_measures_every_cell(smoke: Path) -> None:
    records = {r.cell: r for r in Ledger(smoke).read()}
    assert set(records) == set(cells_of("smoke"))
    for cell, r in records.items():
        m: dict[str, Any] = r.metrics
        assert r.failure is None
        assert [name for name, value in m.items() if value is None] == [], cell
        for proposal in ("own", "laplace"):
            assert m[f"elbo_{proposal}"] <= m[f"iwae_{proposal}"]
            assert 0 <= m[f"khat_share_{proposal}"] <= 1
            assert m[f"iwae_bits_{proposal}"] == pytest.approx(
                -m[f"iwae_{proposal}"] / (64 * math.log(2)) + math.log2(17)
            )
            assert m[f"diagonal_gap_{proposal}"] >= -1e-6
        assert m["iwae_better"] == max(m["iwae_own"], m["iwae_laplace"])
        assert m["rho"] == pytest.approx(m["mse"] / m["sigma"] ** 2)
        assert 0 <= m["active_laplace"] <= int(r.factors["z_dim"][1:])
        assert min(m["train_seconds"], m["eval_seconds"], m["sigma"]) > 0
        steps = cells_of("smoke")[cell].spec().fit.arguments()["steps"]
        assert m["steps"] == steps
        assert (m["iwae_own"] == m["iwae_laplace"]) == (r.factors["guide"] == "laplace")
        assert (m["diagonal_gap_own"] == 0) == (r.factors["guide"] == "diagonal")


def test_tables_come_from_the_cells_file_alone(smoke: Path, tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_bytes((smoke / "cells.jsonl").read_bytes())
    arguments = ["reproduce", "five", "--scale", "smoke", "--tables-only", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    text = (tmp_path / "tables.md").read_text()
    assert text == (smoke / "tables.md").read_text()
    assert "None" not in text
    assert "nan" not in text
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"(figures/{path.name})" in text


def test_a_cell_is_the_same_in_every_process(smoke: Path, tmp_path: Path) -> None:
    cell = cells_of("smoke")["digits/steps/five/d8/0"]
    spec = cell.spec()
    context = Context(tmp_path, STUDY.scales["smoke"], torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = STUDY.measure(cell, spec, spec.load_data(), context)
    finally:
        torch.set_num_threads(threads)
    (kept,) = [r.metrics for r in Ledger(smoke).read() if r.cell == cell.name]
    timings = {"train_seconds", "eval_seconds"}
    assert {k: v for k, v in found.items() if k not in timings} == {
        k: v for k, v in kept.items() if k not in timings
    }
