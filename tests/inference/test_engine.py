"""The graph engine against the eager one: same numbers from the same draws."""

from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from pvae.inference import ELBO
from pvae.inference.engine import EagerEngine, GraphEngine, make_engine

from .programs import LinearGuide, LinearModel, parameters


@pytest.fixture(autouse=True)
def _no_validation() -> Iterator[None]:
    with pyro.validation_enabled(False):
        yield


def gradients_and_loss(engine: Any, programs: tuple[nn.Module, nn.Module], x: Tensor) -> tuple[Tensor, Any]:
    torch.manual_seed(4)
    losses = engine((x,), torch.tensor(0.7, dtype=x.dtype))
    return losses, [None if p.grad is None else p.grad.clone() for p in parameters(*programs)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["elbo", "mean_field", "iwae", "dreg"])
@pytest.mark.parametrize("ladder", [False, True])
def test_the_graph_gives_the_losses_and_gradients_of_the_programs(kind: Any, ladder: bool) -> None:
    programs = LinearModel(ladder=ladder, factor=0.1), LinearGuide(ladder=ladder)
    objective, x = ELBO(kind, 3), torch.randn(7, 5)
    eager, graph = EagerEngine(objective, *programs), GraphEngine(objective, *programs, compile=False)
    for _ in range(2):  # traced, then replayed
        wanted = gradients_and_loss(eager, programs, x)
        ours = gradients_and_loss(graph, programs, x)
        torch.testing.assert_close(ours[0], wanted[0], rtol=1e-12, atol=1e-12)
        for a, b in zip(ours[1], wanted[1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert graph.names == eager.names
        x = torch.randn(7, 5)


def test_the_graph_follows_its_parameters() -> None:
    programs, x = (LinearModel(), LinearGuide()), torch.randn(7, 5)
    graph = GraphEngine(ELBO(), *programs, compile=False)
    before, _ = gradients_and_loss(graph, programs, x)
    with torch.no_grad():
        programs[0].decoder.bias.add_(1.0)
    after, _ = gradients_and_loss(graph, programs, x)
    wanted, _ = gradients_and_loss(EagerEngine(ELBO(), *programs), programs, x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, wanted)


def test_the_graph_draws_anew_at_every_call_and_serves_every_shape() -> None:
    programs = LinearModel(), LinearGuide()
    graph = GraphEngine(ELBO(), *programs, compile=False)
    x = torch.randn(7, 5)
    assert not torch.equal(graph((x,), torch.ones(())), graph((x,), torch.ones(())))
    assert graph((x[:3],), torch.ones(())).isfinite().all()


def test_frozen_parameters_stay_without_gradient() -> None:
    programs, x = (LinearModel(), LinearGuide()), torch.randn(7, 5)
    programs[0].decoder.bias.requires_grad_(False)
    GraphEngine(ELBO(), *programs, compile=False)((x,), torch.ones(()))
    assert programs[0].decoder.bias.grad is None
    assert programs[0].decoder.weight.grad is not None


@pytest.mark.slow
def test_the_compiled_graph_has_the_same_gradients_in_expectation() -> None:
    torch.manual_seed(0)
    programs, x = (LinearModel(), LinearGuide()), torch.randn(1, 5).expand(20_000, 5).contiguous()
    wanted, reference = gradients_and_loss(EagerEngine(ELBO("mean_field"), *programs), programs, x)
    ours, gradients = gradients_and_loss(GraphEngine(ELBO("mean_field"), *programs), programs, x)
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2)
    for a, b in zip(gradients, reference, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="engine must be 'eager' or 'graph', got 'jit'"):
        make_engine("jit", ELBO(), LinearModel(), LinearGuide(), True)
