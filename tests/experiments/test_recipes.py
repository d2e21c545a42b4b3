"""Every recipe that is found trains, draws its figures and is judged, on its data or a small stand-in."""

import json
import tomllib
from pathlib import Path

import pytest
import torch

from pvae.data import Data, from_tensors
from pvae.experiments import Spec, load_spec
from pvae.experiments.jobs import train
from pvae.experiments.spec import recipes

# Data that are not in every installation, and the shape of noise that stands in for them here.
STAND_INS = {"mnist": (1, 28, 28)}


def _load(spec: Spec, root: object = None, download: bool = False) -> Data:
    arguments = spec.data.arguments()
    shape = STAND_INS.get(arguments["name"])
    if shape is None:
        return spec.load_data()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (600, *shape), dtype=torch.uint8, generator=generator)
    return from_tensors(x[:520], x[520:560], x[560:], name=arguments["name"], binarize=arguments["binarize"])


def test_the_recipes_of_the_baselines_are_there() -> None:
    assert {"vae", "vae-mnist", "vampprior-mnist", "iwae-mnist"} <= set(recipes())


@pytest.mark.parametrize("name", list(recipes()))
def test_recipe_runs_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(name, ["fit.steps=2", "evaluate.num_particles=4", "evaluate.limit=12"])
    data = _load(spec)
    monkeypatch.setattr(Spec, "load_data", lambda *_: data)
    trained = train(spec, tmp_path / name, progress=False)
    assert trained.run.steps == 2
    assert trained.estimate is not None
    assert trained.estimate.log_prob.isfinite().all()
    assert len(trained.estimate.log_prob) == 12
    assert [path.name for path in trained.pictures] == ["losses.png", "reconstructions.png", "samples.png"]
    assert all(path.is_file() for path in trained.pictures)
    assert trained.notes == []


@pytest.mark.parametrize(("name", "path"), list(recipes().items()))
def test_recipe_says_what_it_is(name: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "arXiv:" in text.split("\n\n")[0]
    assert 10 < len(load_spec(name).description) < 80
    # Every part stands in the file, so that two recipes can be compared line by line.
    written = tomllib.loads(text)
    assert all(
        "kind" in written[table] for table in ("prior", "posterior", "encoder", "decoder", "likelihood")
    )


def test_baselines_differ_in_what_their_names_say() -> None:
    vae, vamp = (load_spec(name).model_dump() for name in ("vae-mnist", "vampprior-mnist"))
    assert [key for key in vae if vae[key] != vamp[key]] == ["description", "prior"]
    assert load_spec("iwae-mnist").fit.arguments()["objective"] == "iwae"
    assert json.dumps(vae["encoder"]) == json.dumps(vae["decoder"])
