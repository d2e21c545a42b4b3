"""DiVAE's study: its cells, what one measures, and what the tables say of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pvae.data import load
from pvae.experiments.cli import app
from pvae.experiments.reproduce import Cell, Context, Ledger, Record
from pvae.experiments.reproduce.divae import (
    _ERROR,
    _METHODS,
    _PRIORS,
    DiVAEStudy,
    _reference,
    _truth,
)
from pvae.experiments.spec import load_spec

STUDY = DiVAEStudy()
T_2 = 4.302652729911275  # 97.5 % point of Student's t with two degrees of freedom, from a printed table


def cells_of(scale: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in STUDY.cells(STUDY.scales[scale])}


def record(method: str, change: str = "as-is", seed: int = 0, **metrics: float) -> Record:
    factors = {"data": "k3", "prior": "mixture", "method": method, "change": change}
    return Record(
        study="divae",
        scale="smoke",
        cell="/".join([*factors.values(), str(seed)]),
        key="k",
        factors=factors,
        seed=seed,
        metrics=dict(metrics),
        failure=None if metrics else "diverged",
        protocol={"name": "k3", "hash": "abc"},
        settings={"num_data": 10},
        seconds=1.0,
        environment={},
    )


def test_every_alignment_meets_every_prior() -> None:
    cells = cells_of("cpu")
    main = [cell for cell in cells.values() if cell.factors["change"] == "as-is"]
    assert len(main) == len(_METHODS) * len(_PRIORS) * 2 * 3  # data sets and seeds
    assert [cell.seed for cell in cells.values()] == sorted(cell.seed for cell in cells.values())
    for cell in main:
        spec, method = cell.spec(), cell.factors["method"]
        assert spec.prior.kind == cell.factors["prior"]
        assert (spec.align is None) == (method == "none")
        if spec.align is not None:
            assert spec.align.kind == ("flow" if method == "flow" else "direct")
            assert spec.align.dim == spec.z_dim  # else a flow could not be
            assert (
                spec.align.preset == (method if method in ("paper", "released") else None) or method == "flow"
            )


def test_methods_differ_in_the_alignment_alone() -> None:
    for prior in _PRIORS:
        specs = [
            cell.spec().model_dump(exclude={"align"})
            for cell in cells_of("cpu").values()
            if (cell.seed, cell.factors["data"], cell.factors["prior"]) == (0, "mnist", prior)
        ]
        assert len(specs) >= len(_METHODS)
        assert all(spec == specs[0] for spec in specs)


def test_a_change_is_one_thing() -> None:
    changed = {
        cell.factors["change"]: cell.spec().model_dump()
        for cell in cells_of("cpu").values()
        if (cell.seed, cell.factors["data"]) == (0, "mnist")
        and (cell.factors["prior"], cell.factors["method"]) == ("mixture", "paper")
    }
    plain = changed.pop("as-is")
    differ = {
        name: [key for key in plain["align"] if spec["align"][key] != plain["align"][key]]
        for name, spec in changed.items()
    }
    assert differ.pop("codes") == []  # what an encoder makes of the data is no key
    assert differ == {
        "gamma-0.1": ["gamma"],
        "gamma-3": ["gamma"],
        "warmup-0": ["warmup"],
        "warmup-1": ["warmup"],
        "kstar": ["estimator"],
        "kde": ["estimator"],
        "pca-20": ["dim"],
        "random": ["projection"],
    }


@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_a_cell_needs_nothing_of_its_recipe_but_parts(scale: str) -> None:
    """Batches, rates and schedules are the study's own."""
    for cell in cells_of(scale).values():
        fit = load_spec(cell.recipe, [*cell.overrides, "fit.seed=0"]).fit.arguments()
        assert (fit["batch_size"], fit["lr"], fit["optimizer"], fit["engine"]) == (128, 1e-3, "adam", "graph")
        assert not fit.get("beta_warmup")


def test_the_truth_is_changed_as_it_says() -> None:
    data = load("embedded_mixture", dim=8, num_components=3, num_train=4000)
    assert data.log_density_intrinsic is not None
    rho = data.log_density_intrinsic(data.train.x.double())
    found = {
        name: _truth(name, data, seed=3) for name in ("exact", "noise-1", "noise-3", "bias-2", "slope-half")
    }
    assert all(torch.all(target.standard_error == _ERROR) for target in found.values())
    errors = {name: target.log_density - rho for name, target in found.items()}
    assert torch.equal(errors["exact"], torch.zeros_like(rho))
    assert torch.allclose(errors["bias-2"], torch.full_like(rho, 2.0))
    for name, size in (("noise-1", 1.0), ("noise-3", 3.0)):
        assert float(errors[name].mean()) == pytest.approx(0, abs=4 * size / math.sqrt(4000))
        assert float(errors[name].std()) == pytest.approx(size, rel=0.05)
    half = found["slope-half"].log_density
    assert float(half.mean()) == pytest.approx(float(rho.mean()))
    assert torch.allclose(half.diff(), 0.5 * rho.diff())
    assert torch.equal(_truth("noise-1", data, 3).log_density, found["noise-1"].log_density)


def test_199_neighbours_have_that_error() -> None:
    k = 199
    assert math.sqrt((4 * k + 2) / (k * (k - 1))) == pytest.approx(_ERROR, abs=5e-4)


def test_the_reference_of_images_is_the_same_for_all(tmp_path: Path) -> None:
    data = load("digits")
    context = Context(tmp_path, STUDY.scales["smoke"], torch.device("cpu"))
    first = _reference(data.test[:20], data, context)
    assert (tmp_path / "shared" / "densities").is_dir()
    assert torch.equal(first, _reference(data.test[:20], data, context))
    assert first.shape == (20,)


def test_claims_are_judged_by_their_interval() -> None:
    rows = {"none": (0.5, 0.6, 0.7), "paper": (0.4, 0.4, 0.4), "flow": (0.9, 0.1, 0.5)}
    records = [
        record(method, "as-is", seed, ks=value, pearson=1 - value, **{"auroc/other/s": 1 - value})
        for method, values in rows.items()
        for seed, value in enumerate(values)
    ]
    text = "\n".join(STUDY.tables(records))
    # Differences of 0.1, 0.2 and 0.3: mean 0.2, standard deviation 0.1.
    half = T_2 * 0.1 / math.sqrt(3)
    assert 0.2 < half < 0.25
    row = "| DIRECT agrees better than none | mixture | KS | -0.20 ± 0.25: open |"
    assert row in text
    assert "| FLOW agrees worse than DIRECT | mixture | Pearson |" in text
    assert "AUROC of −s, other" in text  # noqa: RUF001
    sharp = [
        record(method, seed=seed, ks=value + 0.125 * seed)
        for seed in range(3)
        for method, value in (("none", 0.5), ("paper", 0.25))
    ]
    assert "| DIRECT agrees better than none | mixture | KS | -0.25 ± 0: yes |" in "\n".join(
        STUDY.tables(sharp)
    )
    worse = [
        record(method, seed=seed, ks=value - 0.01 * seed * (method == "paper"))
        for seed in range(3)
        for method, value in (("none", 0.2), ("paper", 0.5))
    ]
    assert "KS | 0.290 ± 0.025: no |" in "\n".join(STUDY.tables(worse))


def test_tables_and_figures_of_an_unfinished_study(tmp_path: Path) -> None:
    records = [
        record("none", ks=0.5),
        record("paper", ks=0.4),
        record("paper", change="exact", ks=0.3),
        record("flow"),
    ]
    text = "\n".join(STUDY.tables(records))
    assert "| mixture | FLOW | 0 of 1 |" in text
    assert " nan" not in text
    assert "| the truth | -0.1 |" in text
    drawn = STUDY.figures(records, tmp_path / "a", "A")
    assert [path.name for path in drawn] == ["a-alignment.png", "a-changes.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study at the smallest scale, run by the command."""
    folder = tmp_path_factory.mktemp("divae")
    result = CliRunner().invoke(
        app, ["reproduce", "divae", "--scale", "smoke", "--out", str(folder), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert all(Path(path).is_file() for path in json.loads(result.stdout)["files"])
    return folder


def test_smoke_measures_every_cell(smoke: Path) -> None:
    records = {r.cell: r for r in Ledger(smoke).read()}
    assert set(records) == set(cells_of("smoke"))
    for cell, r in records.items():
        m: dict[str, Any] = r.metrics
        assert r.failure is None
        assert [name for name, value in m.items() if value is None and name != "infeasible"] == [], cell
        assert m["elbo"] <= m["iwae"] + 1e-9
        for name in ("ks", "ks_centred", "khat_share", "auroc/other/s", "auroc/other/ELBO"):
            assert 0 <= m[name] <= 1
        assert abs(m["pearson"]) <= 1
        assert m["steps"] == 30
        method = r.factors["method"]
        assert ("target_mean" in m) == ("pearson_train" in m) == (method != "none")
        assert ("flow_ks" in m) == (method == "flow")
        if method == "matched":
            # The prior's mean is that of draws, at the end of training; the offset was fixed at its start.
            assert math.isfinite(m["target_mean"])


def test_tables_come_from_the_cells_file_alone(smoke: Path, tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_bytes((smoke / "cells.jsonl").read_bytes())
    arguments = ["reproduce", "divae", "--scale", "smoke", "--tables-only", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    text = (tmp_path / "tables.md").read_text()
    assert text == (smoke / "tables.md").read_text()
    assert "None" not in text
    assert " nan" not in text


def test_a_cell_is_the_same_in_every_process(smoke: Path, tmp_path: Path) -> None:
    cell = cells_of("smoke")["k3/mixture/flow/as-is/0"]
    context = Context(tmp_path, STUDY.scales["smoke"], torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = STUDY.run(cell, context).metrics
    finally:
        torch.set_num_threads(threads)
    (kept,) = [r.metrics for r in Ledger(smoke).read() if r.cell == cell.name]
    assert found | {"train_seconds": 0} == kept | {"train_seconds": 0}
