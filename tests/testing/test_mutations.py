"""Every mutation still applies, and each of them breaks a test."""

from pathlib import Path

import pytest

from tests.testing.mutations import MUTATIONS, ROOT, Mutation, Runner, main, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies_and_compiles(mutation: Mutation) -> None:
    text = (ROOT / mutation.path).read_text()
    changed = mutated(mutation, text)
    assert changed != text
    compile(changed, mutation.path, "exec")


def test_a_mutation_that_lost_its_place_is_refused() -> None:
    mutation = Mutation("none", "a.py", "x", "y", ("tests/a.py", ""))
    with pytest.raises(ValueError, match=r"a\.py must hold 'x' exactly once, found it 2 times"):
        mutated(mutation, "x + x")


def test_a_run_names_the_test_that_breaks(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_one():\n    assert 1 == 2, 'one is not two'\n")
    with Runner() as run:
        broken = run(tmp_path, ("test_a.py", "one"))
        assert broken is not None
        assert broken.startswith("test_one")
        (tmp_path / "test_a.py").write_text("def test_one():\n    pass\n")
        assert run(tmp_path, ("test_a.py", "one")) is None
        with pytest.raises(RuntimeError, match="pytest could not run test_b"):
            run(tmp_path, ("test_b.py", "one"))


@pytest.mark.slow
def test_every_mutation_breaks_a_test() -> None:
    lines: list[str] = []
    assert main(lines.append) == 0, "".join(lines)
    assert lines[-1] == f"{len(MUTATIONS)} of {len(MUTATIONS)} mutations break a test\n"
