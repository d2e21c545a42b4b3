"""The examples of the kit run as they stand."""

import doctest
import importlib
import pkgutil

import pytest

import pvae.testing

MODULES = [f"pvae.testing.{module.name}" for module in pkgutil.iter_modules(pvae.testing.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_public_functions_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in pvae.testing.__all__:
        if name not in ("ExactnessError", "Report"):
            assert any(test.examples for test in finder.find(getattr(pvae.testing, name), name)), name
