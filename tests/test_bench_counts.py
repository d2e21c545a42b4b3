"""What a step does, in numbers that no clock disturbs: work that doubles fails here, on any machine."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics

from pvae.data import Split, from_tensors
from pvae.experiments.bench import CASES, Case, OpCounter, count_step
from pvae.experiments.bench.hand_loops import HandLoop
from pvae.inference.trainer import Trainer

# Operations that the library may add to those of the loop by hand: densities as Pyro's distributions write
# them, the parts of the loss, and the order of an epoch; 76, 76 and 81 when this was written.
_BESIDE_EAGER = 100
# The graph has no autograd and no Pyro in it: 11 more than the loop, 3 and 28 less.
_BESIDE_GRAPH = 20

# Kernels that inductor made of the whole step when this was written, with torch 2.13 on a CPU; 15 and 21 of
# the first two loops by hand.
_KERNELS = {"small": 18, "medium": 24, "conv": 79}


def _split(case: Case) -> Split:
    levels = torch.randint(256, (16, *case.x_shape), dtype=torch.uint8)
    return from_tensors(levels, binarize="dynamic").train


def _small(name: str) -> Case:
    """The case with narrow layers, where it has a say in them: as many operations, and less to compute."""
    case = CASES[name]
    if not case.hidden:
        return case
    return replace(case, x_shape=(1, 4, 4), z_dim=2, hidden=tuple(8 for _ in case.hidden))


@pytest.mark.parametrize(("engine", "beside"), [("eager", _BESIDE_EAGER), ("traced", _BESIDE_GRAPH)])
@pytest.mark.parametrize("name", CASES)
def test_a_step_has_few_operations_beside_those_of_the_loop_by_hand(
    name: str, engine: str, beside: int
) -> None:
    case = _small(name)
    split = _split(case)
    loop = HandLoop(case.hand(), torch.randint(256, (16, *case.x_shape), dtype=torch.uint8), batch_size=8)
    loop.run(1)
    with OpCounter() as by_hand:
        loop.run(1)
    assert by_hand.count > 100
    counts = count_step(case.program(), split, engine)
    assert by_hand.count / 2 < counts.operations <= by_hand.count + beside
    assert counts.syncs == 0


def test_operations_of_the_backward_pass_are_counted() -> None:
    x = torch.ones(3, requires_grad=True)
    with OpCounter() as forward:
        y = x.exp().sum()
    with OpCounter() as both:
        x.exp().sum().backward()
    assert float(y.detach()) > 0
    assert forward.count >= 2
    assert both.count > forward.count + 2


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Count one compilation, and forget it."""
    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", CASES)
def test_the_compiled_step_is_one_graph_of_few_kernels(name: str) -> None:
    case = _small(name)
    trainer = Trainer(*case.program(), total_steps=4, engine="graph", window=4)
    with trainer.generator():
        for batch in _split(case).batches(8, seed=0, epoch=0, drop_last=True):
            trainer.step(batch)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert 0 < metrics.generated_kernel_count <= 1.5 * _KERNELS[name]
