"""What is shipped: the files of sdist and wheel, their metadata, and the wheel at work on its own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import pvae

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "guides", "experiments")
NOT_SHIPPED = ("tests", "benchmarks", "docs", ".ci")
DIST_INFO = f"pyro_pvae-{pvae.__version__}.dist-info"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, then the wheel from it, in a copy of the checkout: nothing stale can be packed."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("pvae", *ROOMS, *NOT_SHIPPED):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, checkout)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"pyro_pvae-{pvae.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"{DIST_INFO}/METADATA").decode())


def shipped() -> dict[str, str]:
    """Map the path of each file that must ship, in the checkout, to its path in the wheel."""
    links = {ROOT / "pvae" / room for room in ROOMS}
    ours = [path for path in (ROOT / "pvae").rglob("*") if not links & {path, *path.parents}]
    files = {path: path.relative_to(ROOT).as_posix() for path in ours}
    for room in ROOMS:
        files |= {path: f"pvae/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob("*")}
    return {
        path.relative_to(ROOT).as_posix(): target
        for path, target in files.items()
        # What was measured stays in the repository.
        if path.suffix in {".py", ".toml", ".typed", ".html", ".css"} and "results" not in path.parts
    }


def test_wheel_holds_exactly_the_package(wheel: Path) -> None:
    info = ("METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt", "licenses/LICENSE")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sorted(names) == sorted([*shipped().values(), *(f"{DIST_INFO}/{name}" for name in info)])
    assert {"pvae/py.typed", "pvae/models/vae.py", "pvae/experiments/recipes/vae.toml"} <= set(names)


def test_wheel_holds_what_the_checkout_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for source, target in shipped().items():
            assert archive.read(target) == (ROOT / source).read_bytes()


def test_sdist_holds_the_sources_and_no_link(built: Path) -> None:
    with tarfile.open(built / f"pyro_pvae-{pvae.__version__}.tar.gz") as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    extra = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md"}
    made = {name for name in names if name == "PKG-INFO" or name == "setup.cfg" or ".egg-info/" in name}
    assert names - made == {*shipped(), *extra}
    assert not [member.name for member in members if member.issym() or member.islnk()]


def test_metadata(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("pyro-pvae", pvae.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_requirements_name_no_build_of_torch(metadata: Message) -> None:
    """Which build of torch is right is the user's choice: no address, no local version, no upper bound."""
    requirements = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("torch>=") for line in requirements)
    assert not [line for line in requirements if not re.fullmatch(r"[\w-]+>=[\d.]+", line)]


def readme_example() -> str:
    """Return the README's first Python block."""
    found = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, "README.md must have a Python example"
    return found.group(1)


@pytest.mark.slow
def test_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    """In a new environment, the package from the wheel only, README's example and the command run."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    run(install, tmp_path)
    # Dependencies are borrowed, as they are gigabytes. A folder named in a .pth file is put on the path, but
    # its own .pth files are not read, so the editable install of the checkout there stays out of sight.
    own = Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip()
    )
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = run(
        [str(python), "-c", "import pvae, pvae.models; print(pvae.__file__, pvae.models.__file__)"], tmp_path
    )
    assert all(path.startswith(str(own)) for path in where.split())

    (tmp_path / "example.py").write_text(readme_example())
    assert re.search(r"-\d+\.\d+", run([str(python), "example.py"], tmp_path)), (
        "the example must print its estimate"
    )
    assert "vae" in run([str(tmp_path / "venv" / "bin" / "pvae"), "list"], tmp_path)


def run(command: list[str], cwd: Path) -> str:
    """Run a command away from the checkout and return what it prints."""
    clean = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    result = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
