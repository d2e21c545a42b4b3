"""Rooms import one way only and heavy packages lazily; an ``__init__`` file only re-exports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_PARTS = {"ops", "nn", "distributions", "priors", "likelihoods"}
_LIBRARY = _PARTS | {"data", "inference", "evaluation", "models", "guides", "alignment", "density"}
_LIBRARY |= {"canvas", "files", "moments"}

# What a room may import from. A new room takes a row here, and that is the moment to decide where it stands.
ALLOWED: dict[str, set[str]] = {
    "ops": set(),
    "files": set(),
    "moments": set(),
    "canvas": {"files"},
    "density": {"ops", "files"},
    "nn": {"ops"},
    "distributions": {"ops", "nn"},
    "priors": {"ops", "nn", "distributions"},
    "likelihoods": {"ops", "nn", "distributions"},
    "alignment": {"ops", "nn", "distributions", "priors", "moments"},
    "data": {"ops"},
    "inference": _PARTS | {"alignment", "data", "files", "moments"},
    "evaluation": _PARTS | {"data", "inference", "canvas", "files"},
    "models": _PARTS,
    "guides": _PARTS,
    "testing": _LIBRARY,
    "sklearn": _LIBRARY,
    "experiments": _LIBRARY | {"testing", "pvae"},
    "pvae": {"inference", "evaluation"},
    "__main__": {"experiments"},
}

# Slow to import, or needed by few: inside functions only, so that `import pvae` costs torch and Pyro. A room
# that is named for such a package is its face, which no other room imports.
LAZY = {"torchvision", "sklearn", "scipy", "matplotlib", "rich", "xarray"}
LAZY |= {"arviz", "arviz_stats", "arviz_base", "arviz_plots"}
EXPERIMENTS_ONLY = {"pydantic", "typer"}
NEVER_SHIPPED = {"tests", "benchmarks", "pytest", "hypothesis"}


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield ``(dotted module name, path)`` of every shipped source below ``root``, each file once."""
    links = [path for path in (root / "pvae").iterdir() if path.is_symlink()]
    for path in sorted((root / "pvae").rglob("*.py")):
        if not any(link in path.parents for link in links):
            yield _module_name(path.relative_to(root)), path
    for room in ("models", "guides", "experiments"):
        for path in sorted((root / room).rglob("*.py")):
            yield "pvae." + _module_name(path.relative_to(root)), path


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts if parts[-1] != "__init__" else (*parts[:-1], "__init__"))


def room_of(module: str) -> str:
    """Return the room of a module of ours: ``pvae.nn.mlp`` -> ``nn``, ``pvae`` itself -> ``pvae``."""
    parts = [part for part in module.split(".") if part != "__init__"]
    return parts[1] if len(parts) > 1 else "pvae"


def imports(module: str, tree: ast.Module) -> Iterator[tuple[str, int, bool, bool]]:
    """Yield ``(target module, line, relative, at module level)`` of every import in ``tree``."""
    inside = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(scope)
        for node in ast.walk(scope)
    }
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, False, top
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            target = ".".join(part for part in (base, node.module) if part)
            if target == "pvae":  # `from pvae import nn` reaches the room nn, not the face of the package
                for alias in node.names:
                    known = alias.name in ALLOWED
                    yield (f"pvae.{alias.name}" if known else "pvae"), node.lineno, node.level > 0, top
            else:
                yield target, node.lineno, node.level > 0, top


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def violations(root: Path) -> list[str]:
    """Return one line for each import below ``root`` that breaks a rule."""
    found = []
    for module, path in sources(root):
        room = room_of(module)
        where = path.relative_to(root)
        if room not in ALLOWED:
            found.append(f"{where}: room {room!r} has no row in ALLOWED")
            continue
        for target, line, relative, top in imports(module, ast.parse(path.read_text())):
            package = target.split(".")[0]
            note = f"{where}:{line}: {target}: "
            if package == "pvae":
                to = room_of(target)
                if to == room and not relative and room != "pvae":
                    found.append(note + "import relatively inside a room")
                elif to != room and relative and room != "pvae":
                    found.append(note + "import absolutely across rooms")
                if to not in ALLOWED[room] | {room}:
                    found.append(note + f"{room} must not import {to}")
            elif package in {"models", "guides", "experiments"} | NEVER_SHIPPED:
                found.append(note + "not a name the installed package knows")
            elif package == "torchvision" and module != "pvae.data._torchvision":
                found.append(note + "only pvae/data/_torchvision.py imports torchvision")
            elif package in LAZY and top and room not in ("experiments", package):
                found.append(note + "import it inside the function that needs it")
            elif package in EXPERIMENTS_ONLY and room != "experiments":
                found.append(note + "only experiments may import it")
    return found


def init_violations(root: Path) -> list[str]:
    """Return one line for each statement of an ``__init__.py`` that is more than a re-export or a guard."""
    found = []
    for module, path in sources(root):
        if not module.endswith("__init__"):
            continue
        tree = ast.parse(path.read_text())
        where = path.relative_to(root)
        reexported: set[str] = set()
        public: set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.level == 1 or module == "pvae.__init__"):
                reexported |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Assign) and _name(node) == "__all__":
                public = set(ast.literal_eval(node.value))
            elif not (_is_docstring(node) or _is_guard(node) or _is_version(node, module)):
                found.append(
                    f"{where}:{node.lineno}: only a docstring, a guard, re-exports and __all__ belong here"
                )
        differ = (public - {"__version__"}) ^ reexported
        if differ:
            found.append(f"{where}: __all__ and the imports differ in {sorted(differ)}")
    return found


def _name(node: ast.Assign) -> str:
    target = node.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_guard(node: ast.stmt) -> bool:
    named = {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}
    return isinstance(node, ast.If) and "__name__" in named and isinstance(node.body[0], ast.Raise)


def _is_version(node: ast.stmt, module: str) -> bool:
    return isinstance(node, ast.Assign) and _name(node) == "__version__" and module == "pvae.__init__"


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


def test_init_files_only_re_export() -> None:
    assert init_violations(ROOT) == []


def test_every_room_is_seen() -> None:
    assert {room_of(module) for module, _ in sources(ROOT)} == set(ALLOWED)


def test_the_order_has_no_cycle() -> None:
    left = {room: set(below) - {room} for room, below in ALLOWED.items()}
    while left:
        lowest = {room for room, below in left.items() if not below & set(left)}
        assert lowest, f"rooms that import one another in a circle: {sorted(left)}"
        left = {room: below for room, below in left.items() if room not in lowest}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A minimal checkout that breaks no rule."""
    for room in ("nn", "data", "priors"):
        (tmp_path / "pvae" / room).mkdir(parents=True)
        (tmp_path / "pvae" / room / "__init__.py").touch()
    for room in ("models", "guides", "experiments"):
        (tmp_path / room).mkdir()
        (tmp_path / "pvae" / room).symlink_to(Path("..") / room)
    assert violations(tmp_path) == init_violations(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("pvae/nn/a.py", "from pvae.priors import P", "nn must not import priors"),
        ("pvae/nn/a.py", "from pvae import priors", "nn must not import priors"),
        ("pvae/nn/a.py", "import pvae.priors.b", "nn must not import priors"),
        ("pvae/nn/a.py", "from ..priors import P", "nn must not import priors"),
        ("pvae/nn/a.py", "def f():\n    from pvae.priors import P", "nn must not import priors"),
        ("pvae/nn/a.py", "from pvae import fit", "nn must not import pvae"),
        ("pvae/nn/a.py", "from pvae.nn import b", "relatively inside a room"),
        ("pvae/priors/a.py", "from ..nn import b", "absolutely across rooms"),
        ("models/a.py", "from pvae.guides import G", "models must not import guides"),
        ("guides/a.py", "from pvae.models import M", "guides must not import models"),
        ("models/a.py", "from pvae.experiments import e", "models must not import experiments"),
        ("models/a.py", "from guides import G", "not a name the installed package knows"),
        ("experiments/a.py", "import benchmarks", "not a name the installed package knows"),
        ("pvae/data/a.py", "def f():\n    import torchvision", "only pvae/data/_torchvision.py"),
        ("experiments/a.py", "from torchvision.utils import make_grid", "only pvae/data/_torchvision.py"),
        ("pvae/data/a.py", "from sklearn.datasets import load_digits", "inside the function"),
        ("pvae/sklearn.py", "import scipy", "inside the function"),
        ("pvae/priors/a.py", "from pvae.sklearn import VAEDensity", "priors must not import sklearn"),
        ("experiments/a.py", "from pvae import sklearn", "experiments must not import sklearn"),
        ("pvae/nn/a.py", "def f():\n    import pydantic", "only experiments"),
        ("pvae/new/a.py", "", "no row in ALLOWED"),
    ],
)
def test_a_planted_import_is_caught(planted: Path, path: str, text: str, said: str) -> None:
    (planted / path).parent.mkdir(exist_ok=True)
    (planted / path).write_text(text)
    assert said in "\n".join(violations(planted))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pvae/priors/a.py", "from pvae.nn import MLP\nfrom .b import c"),
        ("pvae/data/_torchvision.py", "def f():\n    import torchvision"),
        ("pvae/data/a.py", "def f():\n    import sklearn"),
        ("pvae/sklearn.py", "from sklearn.base import BaseEstimator\nfrom pvae.models import VAE"),
        ("models/a.py", "from pvae.priors import P\nfrom .b import c"),
        ("experiments/a.py", "import pvae\nimport pydantic\nfrom pvae.models import M"),
    ],
)
def test_a_proper_import_passes(planted: Path, path: str, text: str) -> None:
    (planted / path).write_text(text)
    assert violations(planted) == []


@pytest.mark.parametrize(
    "text",
    [
        "from .mlp import MLP\n__all__ = ['MLP']\n\ndef helper(): ...",
        "from .mlp import MLP\n__all__ = []",
        "from .mlp import MLP\n__all__ = ['MLP', 'Other']",
        "import torch",
        "from torch import nn\n__all__ = ['nn']",
        "if True:\n    raise ImportError",
    ],
)
def test_a_planted_init_is_caught(planted: Path, text: str) -> None:
    (planted / "pvae/nn/__init__.py").write_text(text)
    assert init_violations(planted)
