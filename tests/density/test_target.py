"""Targets: their rows and units, files that come back the same or not at all, the cache, the report."""

import doctest
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pvae.density import (
    ESTIMATORS,
    KDE,
    CodeProjection,
    DensityEstimator,
    DensityTarget,
    IdentityProjection,
    Neighbours,
    PAk,
    PCAProjection,
    Progress,
    RandomProjection,
    Scored,
    pak,
    target,
)

from .truths import Floats

OPTIONS: dict[str, dict[str, Any]] = {
    "pak": {"max_neighbors": 60},
    "kstar": {"max_neighbors": 60},
    "kde": {"bandwidth": 0.5},
}


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.from_numpy(load_digits().images / 16).float()[:900]


@pytest.fixture(scope="module")
def new() -> Tensor:
    return torch.from_numpy(load_digits().images / 16).float()[900:1000]


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_it_is_the_estimator_on_the_projection(x: Tensor, new: Tensor, estimator: str) -> None:
    options = OPTIONS[estimator]
    found = DensityTarget.fit(x, dim=4, estimator=estimator, **options)
    u = PCAProjection(4).fit(x)(x)
    fit = ESTIMATORS[estimator](**options).fit(u)
    for tensor in (found.log_density, found.standard_error, found.embedding):
        assert tensor is not None
        assert tensor.dtype == torch.float64
        assert tensor.device.type == "cpu"
    np.testing.assert_array_equal(found.embedding, u)
    np.testing.assert_array_equal(found.log_density, fit.log_density)
    np.testing.assert_array_equal(found.standard_error, fit.standard_error)
    assert found.intrinsic_dim == fit.intrinsic_dim
    assert len(found) == 900
    scored = found.log_prob(new)
    np.testing.assert_array_equal(scored.log_density, fit.score(PCAProjection(4).fit(x)(new)).log_density)
    assert scored.log_density.shape == scored.standard_error.shape == (100,)
    # Training data get their own targets, whatever the batch.
    np.testing.assert_array_equal(found.log_prob(x[37:60]).log_density, found.log_density[37:60])


def test_units_are_those_of_the_data(x: Tensor) -> None:
    found = DensityTarget.fit(x, dim=4, max_neighbors=60)
    levels = DensityTarget.fit(16 * x, dim=4, max_neighbors=60)
    assert found.intrinsic_dim is not None
    shift = found.intrinsic_dim * math.log(16)
    torch.testing.assert_close(levels.log_density, found.log_density - shift, atol=1e-6, rtol=0)


def test_parts_by_name_and_as_objects(x: Tensor) -> None:
    by_name = DensityTarget.fit(x, dim=3, projection="random", estimator="kde", bandwidth=0.3)
    as_object = DensityTarget.fit(x, projection=RandomProjection(3), estimator=KDE(bandwidth=0.3))
    assert torch.equal(by_name.log_density, as_object.log_density)
    # Data of no more dimensions than asked for are taken as they are.
    few = x.reshape(900, -1)[:, 20:23] + torch.rand(900, 3)
    for projection in ("pca", "random", "identity"):
        taken = DensityTarget.fit(few, dim=3, projection=projection, max_neighbors=60)
        assert isinstance(taken.projection, IdentityProjection)
        assert torch.equal(taken.embedding, few.double())  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("projection", ["pca", "random", "identity"])
def test_a_file_brings_everything_back(
    x: Tensor, new: Tensor, estimator: str, projection: str, tmp_path: Path
) -> None:
    if projection == "identity":
        x, new = x.flatten(1)[:, 18:22], new.flatten(1)[:, 18:22]
        x = x + 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    found = DensityTarget.fit(x, dim=3, estimator=estimator, projection=projection, **OPTIONS[estimator])
    path = found.save(tmp_path / "folder" / "target.safetensors")
    again = DensityTarget.load(path)
    for name in ("log_density", "standard_error", "embedding"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert again.hash == found.hash
    assert again.describe() == found.describe()
    assert again.report() == found.report()
    assert repr(again) == repr(found) == f"DensityTarget(900 data, {estimator})"
    before, after = found.log_prob(new), again.log_prob(new)
    assert torch.equal(after.log_density, before.log_density)
    assert torch.equal(after.standard_error, before.standard_error)
    assert torch.equal(again.log_prob(x[:5]).log_density, found.log_density[:5])
    json.dumps([again.describe(), again.report().to_dict()])
    assert [file.name for file in path.parent.iterdir()] == ["target.safetensors"]


def test_duplicates_and_jitter_come_back(x: Tensor, new: Tensor, tmp_path: Path) -> None:
    doubled = torch.cat([x, x[:3]])
    jittered: dict[str, Any] = {"jitter": 0.01, "seed": 4}
    for options in ({}, jittered):
        found = DensityTarget.fit(doubled, dim=3, max_neighbors=60, **options)
        again = DensityTarget.load(found.save(tmp_path / "target"))
        assert torch.equal(again.log_prob(new).log_density, found.log_prob(new).log_density)
        assert torch.equal(again.embedding, found.embedding)  # type: ignore[arg-type]
        assert found.report().num_duplicates == (0 if options else 3)
        assert torch.equal(found.log_density[:3], found.log_density[-3:]) != bool(options)


def test_an_encoder_is_not_stored(x: Tensor, new: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    found = DensityTarget.fit(x, projection=CodeProjection(encoder), max_neighbors=60)
    path = found.save(tmp_path / "target")
    again = DensityTarget.load(path)
    assert torch.equal(again.log_density, found.log_density)
    with pytest.raises(
        ValueError, match=r"new data need the target's projection, .* pass projection to load"
    ):
        again.log_prob(new)
    given = DensityTarget.load(path, projection=CodeProjection(encoder))
    assert torch.equal(given.log_prob(new).log_density, found.log_prob(new).log_density)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match="projection must be the one that was saved"):
        DensityTarget.load(path, projection=CodeProjection(other))


def test_parts_given_twice_serve_two_targets(x: Tensor, new: Tensor, tmp_path: Path) -> None:
    estimator, projection = PAk(max_neighbors=60), PCAProjection(3)

    def fit(data: Tensor) -> DensityTarget:
        return DensityTarget.fit(data, estimator=estimator, projection=projection, cache=tmp_path)

    first = fit(x)
    before = first.log_prob(new)
    other = fit(2 * x[:500])
    assert not estimator.fitted
    again = fit(x)  # from the cache
    for target_ in (first, again):
        assert torch.equal(target_.log_prob(new).log_density, before.log_density)
    # Even where the one given was fitted on other data before.
    path = first.save(tmp_path / "target")
    assert other.estimator is not None
    other.log_prob(new)
    loaded = DensityTarget.load(path, estimator=other.estimator)
    assert torch.equal(loaded.log_prob(new).log_density, before.log_density)
    assert len(other.log_prob(new).log_density) == 100
    assert len(other.estimator.points) == 500


class _Ball(DensityEstimator):
    """A user's estimator: one normal for all."""

    kind = "ball"

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def _fit(self, points: Floats, progress: object) -> Scored[Floats]:
        self.intrinsic_dim = float(points.shape[1])
        return self._score(points, Neighbours(points, points.astype(np.int32)), None)

    def _score(self, queries: Floats, near: Neighbours, report: object) -> Scored[Floats]:
        loc, scale = self.points.mean(0), self.points.std(0)
        value = -0.5 * np.square((queries - loc) / scale).sum(1) - np.log(scale).sum()
        return Scored(value, np.full(len(queries), 0.5))

    def _restore(self, points: Floats, state: dict[str, float]) -> None: ...


def test_a_users_estimator_is_given_again(x: Tensor, new: Tensor, tmp_path: Path) -> None:
    found = DensityTarget.fit(x, dim=3, estimator=_Ball())
    path = found.save(tmp_path / "target")
    with pytest.raises(ValueError, match="new data need the target's estimator"):
        DensityTarget.load(path).log_prob(new)
    again = DensityTarget.load(path, estimator=_Ball())
    assert torch.equal(again.log_prob(new).log_density, found.log_prob(new).log_density)
    with pytest.raises(ValueError, match=r"estimator must be the one that was saved, \{'kind': 'ball'\}"):
        DensityTarget.load(path, estimator=KDE())


def test_other_files_are_refused(x: Tensor, tmp_path: Path) -> None:
    path = DensityTarget.fit(x, dim=3, max_neighbors=60).save(tmp_path / "target")
    content = path.read_bytes()
    for change in (len(content) - 9, len(content) // 2):
        flipped = bytearray(content)
        flipped[change] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"target is damaged: its content does not have the checksum"):
            DensityTarget.load(path)
    path.write_bytes(content.replace(b"max_neighbors", b"max_neighbort"))
    with pytest.raises(ValueError, match="is damaged"):
        DensityTarget.load(path)
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"path must be a safetensors file, but .* is not"):
        DensityTarget.load(path)
    save_file({"log_density": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="path must hold a target written by save"):
        DensityTarget.load(path)
    with pytest.raises(FileNotFoundError):
        DensityTarget.load(tmp_path / "nothing")


def test_the_cache_goes_by_content(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []
    original = PAk._fit

    def counted(self: PAk, points: Floats, progress: Progress | None) -> Scored[Floats]:
        fits.append(len(points))
        return original(self, points, progress)

    monkeypatch.setattr(PAk, "_fit", counted)

    def fit(data: Tensor = x, **changes: Any) -> DensityTarget:
        return DensityTarget.fit(
            data, **{"dim": 3, "max_neighbors": 60, "cache": tmp_path / "cache", **changes}
        )

    first = fit()
    again = fit(x.clone())
    assert len(fits) == 1
    assert torch.equal(again.log_density, first.log_density)
    assert again.report() == first.report()
    assert torch.equal(again.log_prob(x[:4] + 0.01).log_density, first.log_prob(x[:4] + 0.01).log_density)
    moved = x.clone()
    moved[5, 3, 3] += 1e-3
    others: list[dict[str, Any]] = [
        {"data": moved},
        {"data": x.double()},
        {"dim": 4},
        {"max_neighbors": 50},
        {"projection": "random"},
    ]
    for number, changes in enumerate(others, 2):
        fit(**changes)
        assert len(fits) == number
    assert len(list((tmp_path / "cache").iterdir())) == 6
    assert torch.equal(fit().log_density, first.log_density)
    assert len(fits) == 6
    # A damaged file is no target: it is made again, and said so.
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="the cached density is made again: path must be a safetensors file"):
        mended = fit()
    assert len(fits) == 7
    assert torch.equal(mended.log_density, first.log_density)
    fit()
    assert len(fits) == 7


def test_a_known_density(x: Tensor, tmp_path: Path) -> None:
    rho = torch.randn(10)
    known = DensityTarget.known(rho)
    assert torch.equal(known.log_density, rho.double())
    assert (known.standard_error == 1e-3).all()
    assert known.intrinsic_dim is None
    given = DensityTarget.known(rho, torch.rand(10) + 1, torch.randn(10, 2, requires_grad=True))
    again = DensityTarget.load(given.save(tmp_path / "known"))
    for name in ("log_density", "standard_error", "embedding"):
        assert torch.equal(getattr(again, name), getattr(given, name))
        assert not getattr(given, name).requires_grad
    assert again.describe()["estimator"] == {"kind": "known"}
    assert given.hash != known.hash
    assert "by known()" in str(known.report())
    with pytest.raises(ValueError, match=r"DensityTarget\(10 data, known\) does not have: fit it"):
        known.log_prob(x)


def test_the_report_by_numpy(x: Tensor) -> None:
    found = DensityTarget.fit(x, dim=4, max_neighbors=60)
    report = found.report()
    rho, weight = found.log_density.numpy(), found.standard_error.numpy() ** -2
    assert found.embedding is not None
    u = found.embedding.numpy()
    assert (report.num_data, report.dim, report.num_duplicates) == (900, 4, 0)
    assert report.mean == pytest.approx(rho.mean())
    assert report.std == pytest.approx(rho.std())
    assert (report.low, report.high) == pytest.approx(tuple(np.quantile(rho, [0.01, 0.99])))
    assert report.heavy_share == pytest.approx(np.sort(weight)[-9:].sum() / weight.sum())
    assert report.log_scale == pytest.approx(np.log(u.std(0)).sum())
    assert report.explained == pytest.approx(
        u.var(0).sum() / x.flatten(1).double().var(0, correction=0).sum()
    )
    assert 3 <= report.diagnostics["k_star_median"] <= 59
    text = str(report)
    for part in (
        "900 data by pak(max_neighbors=60",
        "pca(dim=4): 4 dimensions",
        f"{report.mean:.3f}",
        "k_star",
    ):
        assert part in text
    assert "clip" not in text
    few = torch.full((900,), 1.0)
    few[:5] = 1e-3
    assert re.search(
        r"hold 100\.0% of the precision, so that they decide: clip",
        str(DensityTarget.known(rho_of(few), few).report()),
    )


def rho_of(error: Tensor) -> Tensor:
    return torch.zeros(len(error))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(2, 2), torch.ones(2, 2)), r"log_density must have shape \(N,\) .* got \(2, 2\)"),
        ((torch.zeros(0), torch.ones(0)), r"got \(0,\)"),
        ((torch.zeros(3), torch.ones(2)), r"standard_error must have shape \(3,\), got \(2,\)"),
        (
            (torch.tensor([0, math.inf]), torch.ones(2)),
            "log_density must be finite, got nan or inf in 1 of 2",
        ),
        (
            (torch.zeros(2), torch.tensor([1, 0])),
            "standard_error must be positive and finite, got values from 0",
        ),
        (
            (torch.zeros(2), torch.ones(2), torch.zeros(3, 2)),
            r"embedding must have shape \(2, d\), got \(3, 2\)",
        ),
    ],
)
def test_tensors_it_refuses(arguments: tuple[Tensor, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DensityTarget(*arguments)  # type: ignore[arg-type]


def test_names_and_options_it_refuses(x: Tensor) -> None:
    with pytest.raises(ValueError, match="estimator must be one of pak, kstar, kde, got 'gmm'"):
        DensityTarget.fit(x, estimator="gmm")
    with pytest.raises(ValueError, match="projection must be one of pca, random, identity, got 'umap'"):
        DensityTarget.fit(x, projection="umap")
    with pytest.raises(TypeError, match="options belong to an estimator given by its name, got alpha"):
        DensityTarget.fit(x, estimator=PAk(), alpha=0.1)
    with pytest.raises(TypeError, match="bandwidth"):
        DensityTarget.fit(x, bandwidth=0.1)


@pytest.mark.parametrize("module", [pak, target])
def test_examples(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
