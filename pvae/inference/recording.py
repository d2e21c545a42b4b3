"""Recording a step as a graph of tensor operations, and making sure that it is one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .isolation import Generators, isolated_rng
from .simplify import simplify

__all__ = ["NotTraceable", "Step", "record"]

Step = Callable[..., list[Tensor | None]]
"""A function of tensors alone: what else it reads is as it was when it was recorded."""

# What autograd asked about shapes while it was recorded: its answers are no tensors, which a compiler
# refuses, and nobody reads them. Forward-mode derivatives leave many.
_QUESTIONS = (torch.ops.aten.is_same_size.default, torch.ops.aten._has_same_storage_numel.default)

# Largest difference between a graph and what it was recorded from, relative to the norm of each result: far
# above rounding, which may differ on a GPU, and far below what another draw makes.
_TOLERANCE = 1e-3


class NotTraceable(ValueError):
    """A step cannot be recorded as a graph, or its graph would not do what it does.

    Attributes:
        reason: Why, as the end of a sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"a step of these programs cannot be traced, as {reason}: use engine='eager'")
        self.reason = reason


def record(
    step: Step, copies: Callable[[], Sequence[Tensor]], device: torch.device, *, simplified: bool
) -> fx.GraphModule:
    """Record a step as a graph of the operations that it made, random draws among them.

    The graph is run on the same arguments and draws as the step, once, and must return the same. Generators
    are left as they are.

    Args:
        step: The step; a list of tensors, or ``None`` where there is nothing to return.
        copies: Returns arguments for it, which a step may write to.
        device: Where they lie.
        simplified: Whether to rewrite the graph for being run operation by operation.

    Returns:
        A graph whose ``forward`` takes the step's arguments.

    Raises:
        NotTraceable: If the step reads a number off a tensor, draws from generators that a graph does not
            know, has shapes that depend on data, or returned something else when it was called again.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with isolated_rng(device):
        start = Generators.now(device)
        try:
            graph = make_fx(step)(*copies())
        except torch.OutOfMemoryError:
            raise
        # Whatever it is, that of the tracer or of a program under it: run eagerly, a program's own is raised.
        except Exception as error:
            raise NotTraceable(f"recording it failed ({_first_line(error)})") from error
        end = Generators.now(device)
        if end.meta != start.meta or not torch.equal(end.tensors["numpy"], start.tensors["numpy"]):
            raise NotTraceable("they draw from the generators of Python or NumPy, which a graph would freeze")
        _check_shapes(graph)
        _drop_questions(graph)
        graph.graph.set_codegen(fx.graph.CodeGen())  # arguments and results as they are, in no containers
        graph.recompile()
        if simplified:
            simplify(graph, copies())
        start.resume(device)
        wanted = step(*copies())
        start.resume(device)
        with torch.no_grad():
            found = graph(*copies())
    if not all(map(_close, found, wanted)):
        raise NotTraceable("they do something else from call to call that is no tensor, such as counting")
    return graph


def _check_shapes(graph: fx.GraphModule) -> None:
    """Refuse operations whose result has a shape that depends on data: the graph holds that of one batch."""
    for node in graph.graph.nodes:
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        if node.target is torch.ops.aten.index.Tensor and not any(map(_is_mask, node.args[1])):
            continue
        raise NotTraceable(f"the shape of a result depends on the data ({node.target})")


def _is_mask(index: Any) -> bool:
    return index is not None and index.meta["tensor_meta"].dtype in (torch.bool, torch.uint8)


def _drop_questions(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target in _QUESTIONS and not node.users:
            graph.graph.erase_node(node)


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two results are the same; one that is not finite says nothing, and is found elsewhere."""
    if one is None or other is None:
        return one is other
    if not bool(other.isfinite().all()):
        return True
    return bool((one - other).norm() <= _TOLERANCE * other.norm())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
