"""The table of components: complete, and with the sources of the modules it names."""

import pytest
from typer.testing import CliRunner

from pvae.experiments.cli import app
from pvae.experiments.components import components, to_markdown
from pvae.experiments.registry import PARTS


def test_every_part_has_a_row() -> None:
    assert [(c.table, c.kind) for c in components()] == [
        (t, k) for t, kinds in PARTS.items() for k in kinds if k != "none"
    ]


@pytest.mark.parametrize(
    ("kind", "name", "source"),
    [
        (("prior", "vamp"), "VampPrior", "Tomczak & Welling 2018, arXiv:1705.07120v5"),
        (("posterior", "normal"), "NormalGuide", "Kingma & Welling 2014, arXiv:1312.6114v10"),
        (("likelihood", "poisson"), "Poisson", ""),
    ],
)
def test_a_row_names_class_and_source(kind: tuple[str, str], name: str, source: str) -> None:
    row = next(c for c in components() if (c.table, c.kind) == kind)
    assert row.name == name
    assert row.source.startswith(source)
    assert bool(row.source) == bool(source)


def test_the_command_prints_it() -> None:
    result = CliRunner().invoke(app, ["list", "--markdown"])
    assert result.stdout.strip() == to_markdown()
