"""Rewritten graphs against the functions they were recorded from: the same bytes, fewer operations."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pvae.inference.simplify import simplify

Step = Callable[..., list[Any]]


def recorded(step: Step, *inputs: Tensor) -> fx.GraphModule:
    """The graph of a step, not simplified."""
    graph = make_fx(step)(*(t.clone() for t in inputs))
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    return graph


def simplified(step: Step, *inputs: Tensor) -> fx.GraphModule:
    return simplify(recorded(step, *inputs), [t.clone() for t in inputs])


def operations(graph: fx.GraphModule) -> list[str]:
    """Names of the operations in a graph, in order."""
    called = [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    return [getattr(node.target, "__name__", node.target) for node in called]


def same_bytes(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return one is other
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
    )


def check(step: Step, *inputs: Tensor) -> fx.GraphModule:
    """Run step and graph from the same seed on copies; results and what became of the copies must agree."""
    graph = simplified(step, *inputs)
    ours, theirs = [t.clone() for t in inputs], [t.clone() for t in inputs]
    for _ in range(2):
        torch.manual_seed(1)
        found = graph.forward(*ours)
        torch.manual_seed(1)
        wanted = step(*theirs)
        assert all(map(same_bytes, found, wanted))
        assert all(map(same_bytes, ours, theirs))
    return graph


X = torch.tensor([[1.5, -0.0, 0.0], [float("inf"), float("nan"), -3e-40]])


@pytest.mark.parametrize(
    "step",
    [
        lambda x: [x.neg().exp() * 1.0],
        lambda x: [torch.ones_like(x) * x.neg().exp()],
        lambda x: [x.neg().exp() / 1.0],
        lambda x: [x.neg().exp() - 0.0],
        lambda x: [x.neg().exp() ** 1.0],
        lambda x: [x.neg().exp().neg().neg()],
        lambda x: [x.neg().view(2, 3).detach().expand(2, 3).t().t().exp()],
        lambda x: [x.neg().exp() - torch.zeros(3).expand(2, 3).contiguous()],
        lambda x: [x.neg().exp(), x.sin()][:1],
    ],
)
def test_what_changes_nothing_is_left_out(step: Step) -> None:
    assert operations(check(step, X)) == ["neg", "exp"]


def test_what_changes_a_minus_zero_stays() -> None:
    assert operations(check(lambda x: [x.neg() + 0.0], X)) == ["neg", "add"]
    assert operations(check(lambda x: [x.neg() - -0.0], X)) == ["neg", "sub"]


def test_what_changes_the_type_stays() -> None:
    assert operations(check(lambda x: [x.abs() * 1.0], torch.tensor([1, 2]))) == ["abs", "mul"]


def test_the_same_is_computed_once() -> None:
    graph = check(lambda x, y: [(x * y).exp() + (x * y).exp(), x * 2.0], X, X + 1)
    assert operations(graph) == ["mul", "exp", "add", "mul"]


def test_numbers_of_other_types_are_other_numbers() -> None:
    x = torch.tensor([1, 2])
    found = check(lambda x: [x * 2, x * 2.0, x * True], x).forward(x)
    assert [t.dtype for t in found] == [torch.int64, torch.float32, torch.int64]


def test_constants_are_computed_before() -> None:
    def step(x: Tensor) -> list[Tensor]:
        scale = x.new_ones(3).expand(2, 3)
        return [(x - 0.5) / (scale**2 * torch.tensor(2.0)) - scale.log()]

    assert operations(check(step, X)) == ["sub", "div"]


def test_a_large_constant_is_not_kept() -> None:
    graph = check(lambda x: [x + torch.full((300, 300), 2.0)], torch.zeros(300, 300))
    assert operations(graph) == ["full", "add"]
    assert not [name for name in vars(graph) if name.startswith("constant")]


def test_constants_that_nobody_reads_are_let_go() -> None:
    graph = check(lambda x: [x * x.new_ones(3)], torch.randn(2, 3))
    assert not [name for name in vars(graph) if name.startswith("constant")]


def test_draws_stay_and_keep_their_order() -> None:
    def step(x: Tensor) -> list[Tensor]:
        first = torch.empty(3).normal_()
        torch.rand(2)  # nobody reads it, but the next one follows it
        return [first, torch.empty(3).normal_(), torch.rand_like(x), torch.bernoulli(torch.full((3,), 0.5))]

    first, second, *_ = check(step, X).forward(X)
    assert not torch.equal(first, second)


def test_reads_on_both_sides_of_a_write_differ() -> None:
    def step(x: Tensor, held: Tensor) -> list[Tensor]:
        before = held * 2.0
        held.mul_(0.5).add_(x)
        return [before, held * 2.0, held.view(6) * 1.0]

    check(step, X, torch.randn(2, 3))


def test_a_write_is_seen_through_views() -> None:
    def step(x: Tensor) -> list[Tensor]:
        whole = torch.zeros(2, 3)
        left, right = whole.t().split([1, 2])
        before = whole.exp()
        right.copy_(x[:, 1:].t())
        left.add_(1.0)
        return [before, whole.exp(), whole]

    check(step, torch.randn(2, 3))


def test_two_inputs_may_share_memory() -> None:
    def step(whole: Tensor, part: Tensor) -> list[Tensor]:
        before = whole.exp()
        part.add_(1.0)
        return [before, whole.exp()]

    graph = recorded(step, torch.zeros(4), torch.zeros(2))
    shared = torch.zeros(4)
    simplify(graph, [shared, shared[:2]])
    whole = torch.zeros(4)
    before, after = graph.forward(whole, whole[:2])
    assert not torch.equal(before, after)


def test_several_fresh_results_of_one_operation_are_several() -> None:
    graph = check(lambda x: [*torch.var_mean(x, 1)], torch.randn(2, 3))
    assert "clone" not in operations(graph)


def test_results_share_no_memory() -> None:
    def step(x: Tensor) -> list[Tensor | None]:
        y = x.exp()
        return [y, y.detach(), y.view(6), x, x.new_ones(3), None]

    graph = check(step, X)
    x = X.clone()
    found = [t for t in graph.forward(x) if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in (x, *found)}) == len(found) + 1
    found[-1].zero_()
    assert graph.forward(x)[4].tolist() == [1.0, 1.0, 1.0]


def test_a_tensor_that_the_step_holds_is_read_anew() -> None:
    weight = torch.tensor([1.0])
    graph = simplified(lambda x: [x * weight], torch.ones(1))
    weight.fill_(3.0)
    assert graph.forward(torch.ones(1))[0].item() == 3.0


def test_operations_are_called_through_torch() -> None:
    """The dispatcher's own way of calling takes two to three times as long."""
    x, weight = torch.randn(5, 3), torch.randn(4, 3)
    graph = check(lambda x, w: [torch.addmm(x.new_zeros(4), x, w.t()).relu().sum(0).view(2, 2)], x, weight)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets
    assert not [target for target in targets if isinstance(target, torch._ops.OpOverload)]


SHAPE = (2, 6)


def _turned(x: Tensor, y: Tensor) -> Tensor:
    return x.t().view(SHAPE) if x.t().is_contiguous() else x.view(SHAPE)


PURE: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: x + y,
    lambda x, y: x * y,
    lambda x, y: x - y,
    lambda x, y: x * 1.0,
    lambda x, y: x / 1.0,
    lambda x, y: x - 0.0,
    lambda x, y: x**1.0,
    lambda x, y: -x,
    lambda x, y: x.tanh(),
    _turned,
    lambda x, y: x.detach(),
    lambda x, y: torch.ones_like(x),
    lambda x, y: x.new_zeros(6).expand(SHAPE),
    lambda x, y: torch.rand_like(x),
    lambda x, y: torch.empty(SHAPE, dtype=x.dtype).normal_(),
    lambda x, y: x[:1].expand(SHAPE),
    lambda x, y: torch.cat([*x.split(1)]),
    lambda x, y: torch.var_mean(x, 1, keepdim=True)[1].expand(SHAPE),
]
WRITING: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: x.add_(1.0),
    lambda x, y: x.copy_(y.clone()),
    lambda x, y: x.mul_(0.5),
    lambda x, y: x[:, :3].neg_(),
]


def a_program(seed: int) -> Step:
    """A random program of views, writes, draws, constants and arithmetic on tensors of one shape."""
    choices = random.Random(seed)
    functions = [*PURE, *WRITING]
    plan = [(choices.choice(functions), choices.random(), choices.random()) for _ in range(25)]
    results = [choices.random() for _ in range(3)]

    def step(*inputs: Tensor) -> list[Any]:
        known = [*inputs]

        def pick(share: float) -> Tensor:
            return known[int(share * len(known))]

        for function, one, other in plan:
            x, y = pick(one), pick(other)
            if function in WRITING and 0 in x.stride():
                continue
            value = function(x, y)
            if value.shape == SHAPE:
                known.append(value)
        return [pick(share).clone(memory_format=torch.contiguous_format) for share in results]

    return step


@pytest.mark.parametrize("seed", range(30))
def test_random_programs_keep_every_bit(seed: int) -> None:
    check(a_program(seed), torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE))
