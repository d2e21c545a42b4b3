"""Recipes trained by the eager engine and by the traced one: the same bytes in everything they leave.

That all of them end with the same weights and losses is seen in `test_determinism.py`, with smaller networks.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pvae.experiments import Spec, jobs
from pvae.inference import checkpoint

from .test_recipes import _load, _short

# One of each kind, at its own size.
KINDS = [
    *("cvae-nf-sprites", "divae-mnist-direct", "dvp-tiny", "five-saddle", "hvae-mnist", "iwae-mnist", "vae"),
    *("vampprior-mnist", "x-vae-digits"),
]


def trained(name: str, engine: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The checkpoints after three steps (parameters, optimiser, generators, averages), and the rows."""
    less = ["fit.steps=3", "fit.batch_size=16", "evaluate.after_training=false"]
    spec = _short(name, f"fit.engine={engine}", *less)
    data = _load(spec)
    monkeypatch.setattr(Spec, "load_data", lambda *_: data)
    run = jobs.train(spec, out, progress=False).run
    return [checkpoint.load(out, which)[0] for which in ("last", "final")], run.history


def bytes_of(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.shape, tensor.numpy().tobytes()


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_is_traced_and_trains_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_pictures", lambda *_: [])
    (wanted, rows), (found, ours) = (
        trained(name, engine, tmp_path / engine, monkeypatch) for engine in ("eager", "traced")
    )
    assert ours == rows
    for theirs, tensors in zip(wanted, found, strict=True):
        assert tensors.keys() == theirs.keys()
        assert [n for n in theirs if bytes_of(tensors[n]) != bytes_of(theirs[n])] == []
