"""The study of density estimates: its laws, its cells, what one measures, and what the tables say of them."""

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from typer.testing import CliRunner

from pvae.density import KDE, KStar, PAk, Scored
from pvae.experiments.cli import app
from pvae.experiments.program import SpecError
from pvae.experiments.reproduce import STUDIES, Cell, Context, Ledger, Record
from pvae.experiments.reproduce.density import Law, _draws, _estimator, _law, _main, quality

STUDY = STUDIES["density"]
LAWS = [*(("normal", dim) for dim in (1, 2, 5, 10, 20, 50)), ("mixture", 2), ("mixture", 10)]
T_2 = 4.302652729911275  # 97.5 % point of Student's t with two degrees of freedom, from a printed table


def cells_of(scale: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in STUDY.cells(STUDY.scales[scale])}


def context_of(out: Path, scale: str = "smoke") -> Context:
    return Context(out, STUDY.scales[scale], torch.device("cpu"))


def record(dim: int, estimator: str, rmse: float, seed: int = 0, **setting: str) -> Record:
    factors = {"data": "normal", "dim": f"d{dim}", "estimator": estimator, **setting}
    if not estimator.startswith("kde"):
        factors = {"K": "k199", "volumes": "twonn"} | factors
    return Record(
        study="density",
        scale="smoke",
        cell="/".join([*factors.values(), str(seed)]),
        key="k",
        factors=factors,
        seed=seed,
        metrics={"rmse_new": rmse, "coverage_new": 0.5, "pearson_new": None},
        failure=None,
        protocol={"name": "normal", "hash": "abc"},
        settings={"num_train": 10},
        seconds=1.0,
        environment={},
    )


def logpdf(law: Law, u: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    parts = [
        stats.multivariate_normal(centre, std**2 * np.eye(law.dim)).logpdf(u)
        for centre, std in zip(law.centres, law.stds, strict=True)
    ]
    total: np.ndarray[Any, Any] = logsumexp(np.stack(parts), axis=0) - math.log(len(parts))
    return total


@pytest.mark.parametrize(("family", "dim"), LAWS)
def test_laws_have_the_densities_of_their_draws(family: str, dim: int) -> None:
    law = _law(family, dim)
    assert law.dim == dim
    assert len(law.stds) == (1 if family == "normal" else 8)
    u = law.draw(np.random.default_rng(3), 4000)
    np.testing.assert_allclose(law.log_density(u), logpdf(law, u), atol=1e-10)
    if family == "normal":
        assert stats.kstest(np.square(u).sum(1), stats.chi2(dim).cdf).pvalue > 0.01
    variance = law.centres.var(0) + np.square(law.stds).mean()
    assert (np.abs(u.mean(0) - law.centres.mean(0)) < 4.5 * np.sqrt(variance / len(u))).all()
    np.testing.assert_allclose(u.var(0), variance, rtol=0.15)


def test_cells_of_every_scale() -> None:
    for scale, seeds in (("smoke", 1), ("cpu", 3), ("full", 4)):
        cells = cells_of(scale)
        assert len(cells) == 43 * seeds
        assert [cell.seed for cell in cells.values()] == sorted(cell.seed for cell in cells.values())
        settings = STUDY.scales[scale].settings()
        assert len({cell.key(settings) for cell in cells.values()}) == len(cells)
        assert {(c.factors["data"], int(c.factors["dim"][1:])) for c in cells.values()} == set(LAWS)
    names = set(cells_of("smoke"))
    assert {"normal/d2/kstar/k50/twonn/0", "mixture/d10/pak/k100/twonn/0", "mixture/d2/kde-scott/0"} <= names
    assert {name for name in names if "/embedding/" in name} == {
        "normal/d20/pak/k199/embedding/0",
        "normal/d50/pak/k199/embedding/0",
    }
    assert sum("/k50/" in name for name in names) == 8
    assert sum("kde-scott" in name for name in names) == 1


def test_the_cpu_scale_is_short() -> None:
    assert sum(cell.seconds for cell in cells_of("cpu").values()) < 12 * 60
    small, large = (
        cells_of("cpu")["normal/d10/pak/k199/twonn/0"],
        cells_of("full")["normal/d10/pak/k199/twonn/0"],
    )
    assert large.seconds == pytest.approx(9 * small.seconds)


def test_a_key_holds_the_sizes_and_the_factors() -> None:
    cell = next(iter(cells_of("smoke").values()))
    settings = STUDY.scales["smoke"].settings()
    assert {key: value for key, value in settings.items() if value} == {"num_data": 500, "num_train": 1000}
    others = [
        cell.key(STUDY.scales["cpu"].settings()),
        replace(cell, seed=1).key(settings),
        replace(cell, factors={**cell.factors, "K": "k50"}).key(settings),
    ]
    assert len({cell.key(settings), *others}) == 4
    with pytest.raises(SpecError):
        cell.spec()


def test_estimators_are_those_of_their_factors() -> None:
    cells = cells_of("smoke")
    found = {name: _estimator(cells[name].factors, 7) for name in cells}
    one = found["normal/d50/pak/k199/embedding/0"]
    assert isinstance(one, PAk)
    assert one.describe() == PAk(199, dim="embedding", seed=7).describe()
    assert found["normal/d2/kstar/k50/twonn/0"].describe() == KStar(50, seed=7).describe()
    assert found["normal/d2/kde/0"].describe() == KDE("cv", seed=7).describe()
    assert found["mixture/d2/kde-scott/0"].describe() == KDE("scott", seed=7).describe()


def test_estimators_are_given_the_same_data() -> None:
    scale: Any = STUDY.scales["smoke"]
    u, new = _draws("normal", 2, 0, scale)
    assert (u.shape, new.shape) == ((1000, 2), (500, 2))
    _draws.cache_clear()
    again, _ = _draws("normal", 2, 0, scale)
    np.testing.assert_array_equal(u, again)
    for other in (_draws("normal", 2, 1, scale)[0], _draws("mixture", 2, 0, scale)[0], new):
        assert not np.isin(other[:, 0], u[:, 0]).any()


def test_quality_by_hand() -> None:
    truth = np.array([0.0, 1.0, 2.0, 3.0, 10.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    error = np.array([1.0, -1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = quality(Scored(truth + error, np.array([1.0, 0.25, 1.0, 1, 1, 1, 1, 1, 1, 1])), truth)
    assert found["bias"] == pytest.approx(0.5)
    assert found["rmse"] == pytest.approx(math.sqrt(1.5))
    assert found["typical"] == 0
    assert found["spread"] == pytest.approx(math.sqrt(1.5 - 0.25))
    assert found["relative"] == pytest.approx(math.sqrt(1.5) / truth.std())
    assert found["pull_mean"] == pytest.approx(0.2)
    assert found["pull_std"] == pytest.approx(math.sqrt((1 + 16 + 4 + 9) / 10 - 0.04))
    # Errors of 1, 4, 2 and 3 standard errors.
    assert found["coverage"] == pytest.approx(0.7)
    assert [found[f"error_{i}"] for i in range(1, 11)] == [1, -1, 2, 0, 0, 0, 0, 0, 0, 3]


def test_metrics_of_a_cell_are_those_of_scipy(tmp_path: Path) -> None:
    context = replace_scale(context_of(tmp_path), num_train=400, num_data=150)
    cell = cells_of("smoke")["mixture/d2/pak/k100/twonn/0"]
    outcome = STUDY.run(cell, context)
    m: dict[str, Any] = outcome.metrics
    assert outcome.failure is None
    scale: Any = context.scale
    u, new = _draws("mixture", 2, 0, scale)
    fit = PAk(100).fit(u)
    for part, points, scored in (
        ("train", u, Scored(fit.log_density, fit.standard_error)),
        ("new", new, fit.score(new)),
    ):
        truth = logpdf(_law("mixture", 2), points)
        line = stats.linregress(truth, scored.log_density)
        inside = 0
        for value, error, exact in zip(scored.log_density, scored.standard_error, truth, strict=True):
            low, high = stats.norm(value, error).interval(0.95)
            inside += low <= exact <= high
        expected = {
            "bias": np.mean(scored.log_density) - np.mean(truth),
            "rmse": np.linalg.norm(scored.log_density - truth) / math.sqrt(len(truth)),
            "spread": stats.tstd(scored.log_density - truth) * math.sqrt(1 - 1 / len(truth)),
            "pearson": line.rvalue,
            "slope": line.slope,
            "spearman": np.corrcoef(stats.rankdata(scored.log_density), stats.rankdata(truth))[0, 1],
            "coverage": inside / len(truth),
        }
        for name, value in expected.items():
            assert m[f"{name}_{part}"] == pytest.approx(value, abs=1e-9), (name, part)
    assert m["intrinsic_dim"] == fit.intrinsic_dim
    assert m["k_star_median"] == np.median(fit.k_star)
    assert m["share_k_star_floor"] == pytest.approx(np.mean(fit.k_star == 3))
    assert m["share_k_star_cap"] == pytest.approx(np.mean(fit.k_star == 99))
    assert m["bandwidth"] is None


def test_a_kernel_estimate_tells_its_bandwidth(tmp_path: Path) -> None:
    context = replace_scale(context_of(tmp_path), num_train=400, num_data=50)
    m = STUDY.run(cells_of("smoke")["mixture/d2/kde-scott/0"], context).metrics
    scale: Any = context.scale
    u = _draws("mixture", 2, 0, scale)[0]
    assert m["bandwidth"] == pytest.approx(math.sqrt(u.var(0).mean()) * 400 ** (-1 / 6))
    assert m["k_star_median"] is None


def replace_scale(context: Context, **sizes: int) -> Context:
    scale: Any = context.scale
    return replace(context, scale=replace(scale, **sizes))


def _untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.endswith("_seconds")}


def test_differences_are_paired_by_seed_and_law() -> None:
    gains = (1.0, 2.0, 3.0)
    records: list[Record] = []
    for seed, gain in enumerate(gains):
        records += [
            record(20, "pak", 10.0 * seed, seed),
            record(20, "kstar", 10.0 * seed + gain, seed),
            record(20, "pak", 10.0 * seed - gain, seed, volumes="embedding"),
            record(20, "pak", 77.0, seed, K="k50"),
            record(20, "kde", 10.0 * seed + 4.0, seed),
        ]
    text = "\n".join(STUDY.tables(records))
    assert T_2 / math.sqrt(3) == pytest.approx(2.48, abs=0.01)
    assert "| 20 | k*-NN | 2.0 ± 2.5 |" in text
    assert "| 20 | PAk, D = d | -2.0 ± 2.5 |" in text
    assert "| 20 | KDE | 4 ± 0 |" in text
    # Every setting has a row of its own, and a kernel estimate has none of PAk's.
    assert "| 20 | PAk | 50 | TWO-NN | 3 | 77 ± 0 |" in text
    assert "| 20 | KDE | – | – | 3 |" in text  # noqa: RUF001
    assert text.count("Standard normals.") == 1
    names = {r.factors["estimator"] for r in _main(records)}
    assert names == {"pak", "kstar", "pak-embedding", "kde"}


def figures(records: Sequence[Record], folder: Path) -> list[str]:
    return [path.name for path in STUDY.figures(records, folder / "a", "A")]


def test_figures_of_an_unfinished_study(tmp_path: Path) -> None:
    names = ["a-dimensions.png", "a-neighbours.png", "a-truth.png"]
    assert figures([record(2, "pak", 1.0), record(2, "kde", 1.0)], tmp_path) == names
    assert figures([record(20, "pak", 1.0)], tmp_path) == names[:1]
    assert figures([record(2, "pak", 1.0, K="k50")], tmp_path) == names[1:2]
    mixture = replace(record(2, "kde", 1.0), factors={"data": "mixture", "dim": "d2", "estimator": "kde"})
    assert figures([mixture], tmp_path) == names[2:]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study at the smallest scale, run by the command."""
    folder = tmp_path_factory.mktemp("density")
    arguments = ["reproduce", "density", "--scale", "smoke", "--out", str(folder), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    files = [Path(path) for path in json.loads(result.stdout)["files"]]
    assert [path.suffix for path in files] == [".md", *[".png"] * 5]
    assert all(path.is_file() for path in files)
    return folder


def test_smoke_measures_every_cell(smoke: Path) -> None:
    records = {r.cell: r for r in Ledger(smoke).read()}
    assert set(records) == set(cells_of("smoke"))
    assert len({(r.protocol["name"], r.protocol["hash"]) for r in records.values()}) == 2
    for name, r in records.items():
        m: dict[str, Any] = r.metrics
        kernel = "kde" in name
        absent = {"k_star_median", "share_k_star_floor", "share_k_star_cap"} if kernel else {"bandwidth"}
        assert {key for key, value in m.items() if value is None} == absent, name
        for part in ("train", "new"):
            squares = m[f"bias_{part}"] ** 2 + m[f"spread_{part}"] ** 2
            assert m[f"rmse_{part}"] ** 2 == pytest.approx(squares)
            assert 0.6 < m[f"spearman_{part}"] < 1
            assert 0 <= m[f"coverage_{part}"] <= 1
            tenths = [m[f"error_{i}_{part}"] for i in range(1, 11)]
            assert np.mean(tenths) == pytest.approx(m[f"bias_{part}"])
        if "/embedding/" in name or kernel:
            assert m["intrinsic_dim"] == int(r.factors["dim"][1:])


def test_smoke_shows_what_is_known(smoke: Path) -> None:
    m: dict[str, Any] = {r.cell: r.metrics for r in Ledger(smoke).read()}
    # Scott's rule smooths eight modes into one; PAk's errors are honest in the plane and k*-NN's are not.
    scott, kde, pak, kstar = (
        m[f"mixture/d2/{name}/0"] for name in ("kde-scott", "kde", "pak/k199/twonn", "kstar/k199/twonn")
    )
    assert scott["slope_new"] < 0.3 < 0.7 < kde["slope_new"]
    assert 0.85 < pak["pull_std_new"] < 1.15 < kstar["pull_std_new"]
    # With the dimensions the range shrinks and ranks are lost, by PAk's correction most.
    slopes = [m[f"normal/d{dim}/pak/k199/twonn/0"]["slope_new"] for dim in (2, 5, 10, 20, 50)]
    assert slopes == sorted(slopes, reverse=True)
    for dim in (10, 20, 50):
        by = {kind: m[f"normal/d{dim}/{kind}/k199/twonn/0"]["pearson_new"] for kind in ("pak", "kstar")}
        assert by["kstar"] > by["pak"]


def test_tables_come_from_the_cells_file_alone(smoke: Path, tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_bytes((smoke / "cells.jsonl").read_bytes())
    arguments = ["reproduce", "density", "--scale", "smoke", "--tables-only", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    text = (tmp_path / "tables.md").read_text()
    assert text == (smoke / "tables.md").read_text()
    for word in ("None", "nan", "k-hat"):
        assert word not in text
    assert [line.split(",")[0] for line in text.splitlines() if line.startswith("## ")] == [
        "## normal",
        "## mixture",
    ]
    # Every row of a table is as wide as its header.
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"(figures/{path.name})" in text


def test_a_cell_is_the_same_in_every_process(smoke: Path, tmp_path: Path) -> None:
    _draws.cache_clear()
    study = pickle.loads(pickle.dumps(STUDY))  # as workers receive it
    for name in ("mixture/d2/kde/0", "normal/d10/pak/k50/twonn/0"):
        found = study.run(cells_of("smoke")[name], context_of(tmp_path))
        (kept,) = [r for r in Ledger(smoke).read() if r.cell == name]
        assert _untimed(found.metrics) == _untimed(kept.metrics)
        assert found.protocol == kept.protocol
