"""What ``import pvae`` loads, and under which names the rooms may be imported."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROBE = """
import json, sys
import torch, pyro, safetensors.torch
before = set(sys.modules)
import pvae
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""

# Standard library and private helpers of torch may still come; these packages may not.
HEAVY = {
    "IPython",
    "PIL",
    "arviz_base",
    "arviz_plots",
    "arviz_stats",
    "jinja2",
    "matplotlib",
    "pandas",
    "pydantic",
    "rich",
    "scipy",
    "sklearn",
    "torchvision",
    "typer",
    "xarray",
    "zuko",
}


def test_import_pvae_loads_nothing_heavy(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    added = set(json.loads(result.stdout))
    assert "pvae" in added
    assert added & HEAVY == set()


@pytest.mark.parametrize("room", ["models", "guides", "experiments"])
def test_a_room_refuses_another_name(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=rf"pvae\.{room}"):
        importlib.import_module(room)


@pytest.mark.parametrize("room", ["models", "guides", "experiments"])
def test_a_room_is_importable_under_its_own_name(room: str) -> None:
    assert importlib.import_module(f"pvae.{room}").__name__ == f"pvae.{room}"
