"""A run with an [align] table: its density, what it leaves behind, and that scores ignore it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import pvae
from pvae.alignment import align
from pvae.density import DensityTarget
from pvae.experiments import SpecError, load_spec
from pvae.experiments.diagnosing import density_of
from pvae.experiments.jobs import train
from pvae.experiments.runs import RunError, open_run
from pvae.experiments.spec import AlignKeys

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = [
    "z_dim=3",
    "encoder.hidden=[16]",
    "decoder.hidden=[16]",
    "prior=mixture",
    "fit.epochs=2",
    "evaluate.limit=20",
    "evaluate.num_particles=10",
]
ALIGNED = [*SMALL, "align.dim=3", "align.max_neighbors=40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "aligned"
    train(load_spec("vae", ALIGNED), path, progress=False)
    return path


def test_a_run_keeps_its_density_and_what_the_prior_was_asked_for(folder: Path) -> None:
    run = open_run(folder)
    kept = density_of(run)
    assert isinstance(kept, DensityTarget)
    made = DensityTarget.fit(run.data.train.clean, dim=3, max_neighbors=40)
    torch.testing.assert_close(kept.log_density, made.log_density, rtol=0, atol=0)
    summary = run.folder.read_manifest()["alignment"]
    assert summary["target_mean"] == pytest.approx(float(made.log_density.mean()), rel=1e-6)
    assert (folder / "figures" / "targets.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all("align" in row for row in rows if "loss" in row)
    for row in rows:
        if "loss" in row:
            assert row["loss"] == pytest.approx(row["reconstruction"] + row["kl"] + row["align"], rel=1e-5)


def test_a_score_is_that_of_the_parameters_without_the_factor(folder: Path) -> None:
    run = open_run(folder)
    target = density_of(run)
    assert isinstance(target, DensityTarget)
    x = run.data.test[:20]
    bare = pvae.log_likelihood(*run.program, x, num_particles=10, progress=False)
    aligned = pvae.log_likelihood(*align(*run.program, target), x, num_particles=10, progress=False)
    assert torch.equal(bare.log_prob, aligned.log_prob)
    (kept,) = run.folder.read_evaluations()
    assert kept["num_particles"] == 10


def test_a_run_goes_on_as_if_it_had_not_stopped(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "in-two-parts"
    whole = load_spec("vae", ALIGNED)
    train(load_spec("vae", [*ALIGNED, "fit.epochs=1"]), path, progress=False)
    train(whole, path, resume=True, progress=False)
    for name, tensor in open_run(path).model.state_dict().items():
        assert tensor.shape == open_run(folder).model.state_dict()[name].shape
    with pytest.raises(RunError, match=r"has align\.gamma = 1\.0, not 2\.0"):
        train(load_spec("vae", [*ALIGNED, "align.gamma=2.0"]), path, resume=True, progress=False)
    with pytest.raises(RunError, match="has align = "):
        train(load_spec("vae", SMALL), path, resume=True, progress=False)


def test_no_weight_is_no_alignment(tmp_path: Path) -> None:
    losses = {}
    for name, changes in {"bare": SMALL, "off": [*ALIGNED, "align.gamma=0.0", "align.warmup=0.0"]}.items():
        train(load_spec("vae", [*changes, "fit.epochs=1"]), tmp_path / name, progress=False)
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    assert losses["bare"] == losses["off"]


@pytest.mark.parametrize(
    "changes",
    [
        ["align=flow", "align.flow_layers=2", "align.flow_hidden=8", "prior=normal"],
        ["align=direct", "align.estimator=kde", "align.preset=paper"],
        ["align=direct", "align.estimator=kstar", "align.preset=released", "align.offset=-3.0"],
        [
            "align=direct",
            "align.unit=embedding",
            "align.average=mean",
            "align.warmup=0.0",
            "posterior=full_covariance",
        ],
    ],
)
def test_every_way_trains(changes: list[str], tmp_path: Path) -> None:
    spec = load_spec(
        "vae", [*SMALL, "fit.epochs=1", "evaluate.after_training=false", *changes, "align.dim=3"]
    )
    found = train(spec, tmp_path / "run", progress=False)
    assert found.run.history[-1]["align"] >= 0
    assert any(note.startswith("alignment: targets ") for note in found.notes)


def test_the_known_density_of_synthetic_data(tmp_path: Path) -> None:
    changes = [
        "data=gaussian_mixture",
        "data.binarize=none",
        "data.num_train=600",
        "likelihood=normal",
        "align.estimator=exact",
    ]
    spec = load_spec("vae", [*SMALL, *changes, "z_dim=2"])
    train(spec, tmp_path / "run", progress=False)
    run = open_run(tmp_path / "run")
    assert run.data.log_density is not None
    kept = DensityTarget.load(run.folder.density)
    torch.testing.assert_close(kept.log_density, run.data.log_density(run.data.train.x.double()))
    with pytest.raises(SpecError, match="needs data with a known density, but digits has none"):
        train(load_spec("vae", [*SMALL, "align.estimator=exact"]), tmp_path / "other", progress=False)


@pytest.mark.parametrize(("kind", "prior"), [("direct", "mixture"), ("flow", "normal")])
def test_the_known_density_of_data_on_a_plane_is_that_of_the_plane(
    kind: str, prior: str, tmp_path: Path
) -> None:
    changes = [
        "data=embedded_mixture",
        "data.binarize=none",
        "data.dim=6",
        "data.num_train=300",
        "likelihood=normal",
        "fit.epochs=1",
        "evaluate.after_training=false",
        f"prior={prior}",
        f"align={kind}",
        "align.estimator=exact",
    ]
    spec = load_spec("vae", [*SMALL, *changes, "z_dim=2"])
    train(spec, tmp_path / "run", progress=False)
    data, kept = open_run(tmp_path / "run").data, DensityTarget.load(tmp_path / "run" / "density.safetensors")
    assert kept.embedding is not None
    plane = data.train.x.double() @ data.truth.rotation[:, :2]
    torch.testing.assert_close(kept.embedding, plane)
    mixture = MixtureSameFamily(
        Categorical(torch.ones(4, dtype=torch.float64)),
        Independent(Normal(data.truth.means, data.truth.stds), 1),
    )
    torch.testing.assert_close(kept.log_density, mixture.log_prob(plane))


def test_a_folder_of_densities_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVAE_CACHE", str(tmp_path / "cache"))
    spec = load_spec("vae", [*ALIGNED, "fit.epochs=1", "evaluate.after_training=false"])
    train(spec, tmp_path / "one", progress=False)
    (kept,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("pvae.density.pak.PAk.fit", None)  # would fail if it were called
    train(spec, tmp_path / "two", progress=False)
    one, two = (DensityTarget.load(tmp_path / name / "density.safetensors") for name in ("one", "two"))
    assert torch.equal(one.log_density, two.log_density)
    assert kept.suffix == ".safetensors"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["align.kind=other"], r"align\.kind"),
        (["align.gama=1.0"], "gama"),
        (["align.dim=0"], r"align\.dim"),
    ],
)
def test_a_wrong_table_is_refused_in_a_sentence(changes: list[str], said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        load_spec("vae", changes)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_aligned_is_refused_before_training(tmp_path: Path) -> None:
    spec = load_spec("vae", [*SMALL, "align=flow", "align.dim=2"])
    with pytest.raises(SpecError, match=r"\[align\]"):
        train(spec, tmp_path / "run", progress=False)


def test_the_table_can_be_taken_back() -> None:
    assert load_spec("vae", ["align=direct", "align=none"]).align is None
    assert load_spec("vae").align is None
    spec = load_spec("vae", ["align=direct", "align.offset=entropy"])
    assert isinstance(spec.align, AlignKeys)
    assert spec.align.offset == "entropy"
    arguments: dict[str, Any] = spec.align.of_align()
    assert arguments["offset"] == "entropy"
    assert arguments["weight"] is None
