"""Encoders: shapes, ranges, and derivatives of derivatives."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from pvae.nn import LOG_VAR_RANGE, ConvEncoder, Encoder, MLPEncoder
from tests.distributions.tracing import assert_traceable

ENCODERS: dict[str, Callable[[], Encoder]] = {
    **{
        f"mlp-{activation}": partial(MLPEncoder, (1, 3, 4), 2, (6, 5), activation)
        for activation in ("relu", "tanh", "silu", "elu", "gelu", "softplus")
    },
    "mlp-gated": lambda: MLPEncoder((1, 3, 4), 2, (6, 5), gated=True),
    "mlp-linear": lambda: MLPEncoder((1, 3, 4), 2, ()),
    **{
        f"conv-{activation}": partial(ConvEncoder, (1, 3, 4), 2, (4, 6), 5, activation)
        for activation in ("relu", "silu", "gelu")
    },
}
every_encoder = pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)


def joined(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat(encoder(x), dim=-1)


@every_encoder
class TestEveryEncoder:
    @pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
    def test_leading_dimensions(self, make: Callable[[], Encoder], batch: tuple[int, ...]) -> None:
        encoder = make().double()
        x = torch.randn(*batch, 1, 3, 4, dtype=torch.float64)
        flat = x.reshape(-1, 1, 3, 4)
        assert encoder.features(x).shape == (*batch, encoder.h_dim)
        for ours, one_dimension in zip(encoder(x), encoder(flat), strict=True):
            assert ours.shape == (*batch, 2)
            torch.testing.assert_close(ours.reshape(-1, 2), one_dimension)

    def test_a_datum_does_not_see_its_batch(self, make: Callable[[], Encoder]) -> None:
        encoder = make().double()
        x = torch.randn(5, 1, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(encoder(x)[0][3], encoder(x[3])[0], rtol=1e-12, atol=1e-12)

    def test_forward_mode_derivative_equals_the_jacobian(self, make: Callable[[], Encoder]) -> None:
        f = joined(make().double())
        x, v = torch.randn(2, 1, 3, 4, dtype=torch.float64).unbind()
        jacobian = torch.autograd.functional.jacobian(f, x)
        tangent = torch.func.jvp(f, (x,), (v,))[1]
        torch.testing.assert_close(tangent, (jacobian * v).sum((-3, -2, -1)), rtol=1e-10, atol=1e-12)

    def test_reverse_over_forward_equals_reverse_over_reverse(self, make: Callable[[], Encoder]) -> None:
        encoder = make().double()
        f = joined(encoder)
        x, v = torch.randn(2, 4, 1, 3, 4, dtype=torch.float64).unbind()
        w = torch.randn(4, 4, dtype=torch.float64)
        parameters = list(encoder.parameters())

        tangent = torch.func.jvp(f, (x,), (v,))[1]
        over_forward = torch.autograd.grad((w * tangent).sum(), parameters, allow_unused=True)

        leaf = x.clone().requires_grad_()
        (cotangent,) = torch.autograd.grad((w * f(leaf)).sum(), leaf, create_graph=True)
        over_reverse = torch.autograd.grad((cotangent * v).sum(), parameters, allow_unused=True)

        assert any(g is not None and g.abs().max() > 1e-3 for g in over_reverse)
        for ours, expected, like in zip(over_forward, over_reverse, parameters, strict=True):
            zero = torch.zeros_like(like)
            torch.testing.assert_close(
                zero if ours is None else ours, zero if expected is None else expected, rtol=1e-6, atol=1e-12
            )

    def test_traceable(self, make: Callable[[], Encoder]) -> None:
        inputs = torch.randn(2, 1, 3, 4, requires_grad=True)
        assert_traceable(joined(make()), (inputs,), (torch.randn(2, 1, 3, 4),))

    def test_gradients_reach_every_parameter(self, make: Callable[[], Encoder]) -> None:
        encoder = make()
        joined(encoder)(torch.randn(8, 1, 3, 4)).square().sum().backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name

    def test_state_dict_round_trip_and_deepcopy(self, make: Callable[[], Encoder]) -> None:
        encoder, other = make(), make()
        twin = copy.deepcopy(encoder)
        other.load_state_dict(encoder.state_dict())
        x = torch.randn(3, 1, 3, 4)
        assert torch.equal(joined(encoder)(x), joined(other)(x))
        assert torch.equal(joined(encoder)(x), joined(twin)(x))

    def test_scale_stays_in_its_range(self, make: Callable[[], Encoder]) -> None:
        encoder = make()
        low, high = (math.exp(0.5 * v) for v in LOG_VAR_RANGE)
        for value in (-1e6, 1e6):
            torch.nn.init.constant_(encoder.head.bias, value)
            _, scale = encoder(torch.randn(3, 1, 3, 4))
            assert (scale > 0.99 * low).all()
            assert (scale < 1.01 * high).all()

    def test_wrong_shape(self, make: Callable[[], Encoder]) -> None:
        with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 1, 3, 4\), got \(5, 12\)"):
            make()(torch.zeros(5, 12))


def test_scale_is_the_root_of_the_exponential_of_the_second_head() -> None:
    encoder = MLPEncoder((3,), 2, ()).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    loc, log_var = (x @ encoder.head.weight.T + encoder.head.bias).split(2, dim=-1)
    ours_loc, ours_scale = encoder(x)
    torch.testing.assert_close(ours_loc, loc)
    torch.testing.assert_close(ours_scale, (0.5 * log_var).exp(), rtol=1e-2, atol=0)


def test_gated_heads_start_as_in_the_vampprior() -> None:
    encoder = MLPEncoder((1, 28, 28), 40, (300, 300), gated=True)
    assert encoder.head.weight.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.03)


@pytest.mark.parametrize(
    "x_shape", [(1, 8, 8), (1, 28, 20), (1, 28, 28), (3, 32, 32), (3, 86, 86), (1, 1, 1)]
)
def test_conv_takes_any_image_size(x_shape: tuple[int, ...]) -> None:
    encoder = ConvEncoder(x_shape, 3, channels=(4, 4), h_dim=8)
    loc, scale = encoder(torch.rand(2, *x_shape))
    assert loc.shape == scale.shape == (2, 3)
    assert loc.isfinite().all()
    assert encoder.x_shape == x_shape


def test_no_normalisation_that_breaks_derivatives() -> None:
    modules = {type(m) for m in ConvEncoder((1, 28, 28), 2).modules()}
    assert torch.nn.GroupNorm in modules
    assert not any("BatchNorm" in m.__name__ or m is torch.nn.LayerNorm for m in modules)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvEncoder((28, 28), 2), r"x_shape must have 3 entries, got \(28, 28\)"),
        (lambda: ConvEncoder((1, 28, 0), 2), r"x_shape must hold positive sizes, got \(1, 28, 0\)"),
        (
            lambda: ConvEncoder((1, 28, 28), 2, channels=(4, 1)),
            "channels must hold sizes of at least 2, got 1",
        ),
        (lambda: ConvEncoder((1, 28, 28), 2, h_dim=0), "h_dim must be positive, got 0"),
        (lambda: MLPEncoder((4,), 0), "z_dim must be positive, got 0"),
        (lambda: MLPEncoder((4,), 2, activation="relu6"), "activation must be one of"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_sizes_from_toml_lists() -> None:
    assert MLPEncoder([4], 2, [3]).x_shape == (4,)
