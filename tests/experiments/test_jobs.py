"""How many threads a job takes."""

from collections.abc import Iterator

import pytest
import torch

from pvae.experiments.jobs import SMALL_PASS, use_threads
from pvae.experiments.spec import load_spec


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("hidden", "expected"), [(16, 1), (2000, 2)])
def test_a_small_step_takes_one_thread(hidden: int, expected: int) -> None:
    spec = load_spec(
        "vae", [f"encoder.hidden=[{hidden}]", f"decoder.hidden=[{hidden}]", "fit.batch_size=1297"]
    )
    program = spec.build(spec.load_data())
    weights = sum(p.numel() for module in program for p in module.parameters())
    assert (weights * 1297 < SMALL_PASS) == (expected == 1)
    use_threads(program, spec)
    assert torch.get_num_threads() == expected


def test_a_number_that_is_given_holds() -> None:
    spec = load_spec("vae")
    use_threads(spec.build(spec.load_data()), spec, 2)
    assert torch.get_num_threads() == 2
