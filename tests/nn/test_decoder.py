"""Decoders: exact sizes, leading dimensions, derivatives."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pvae.nn import ConvDecoder, MLPDecoder
from tests.distributions.tracing import assert_traceable

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLPDecoder(2, (1, 3, 5), (6,)),
    "mlp-gated": lambda: MLPDecoder(2, (1, 3, 5), (6,), gated=True),
    "mlp-linear": lambda: MLPDecoder(2, (1, 3, 5), ()),
    "conv": lambda: ConvDecoder(2, (1, 3, 5), channels=(6, 4), h_dim=5),
}
every_decoder = pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)


@every_decoder
class TestEveryDecoder:
    @pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
    def test_leading_dimensions(self, make: Callable[[], nn.Module], batch: tuple[int, ...]) -> None:
        decoder = make().double()
        z = torch.randn(*batch, 2, dtype=torch.float64)
        x = decoder(z)
        assert x.shape == (*batch, 1, 3, 5)
        torch.testing.assert_close(x.reshape(-1, 1, 3, 5), decoder(z.reshape(-1, 2)))

    def test_forward_mode_derivative_equals_the_jacobian(self, make: Callable[[], nn.Module]) -> None:
        decoder = make().double()
        z, v = torch.randn(2, 2, dtype=torch.float64).unbind()
        jacobian = torch.autograd.functional.jacobian(decoder, z)
        tangent = torch.func.jvp(decoder, (z,), (v,))[1]
        torch.testing.assert_close(tangent, jacobian @ v, rtol=1e-10, atol=1e-12)

    def test_traceable(self, make: Callable[[], nn.Module]) -> None:
        assert_traceable(make(), (torch.randn(3, 2, requires_grad=True),), (torch.randn(3, 2),))

    def test_gradients_reach_every_parameter(self, make: Callable[[], nn.Module]) -> None:
        decoder = make()
        decoder(torch.randn(8, 2)).square().sum().backward()
        for name, parameter in decoder.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name

    def test_state_dict_round_trip_and_deepcopy(self, make: Callable[[], nn.Module]) -> None:
        decoder, other = make(), make()
        twin = copy.deepcopy(decoder)
        other.load_state_dict(decoder.state_dict())
        z = torch.randn(3, 2)
        assert torch.equal(decoder(z), other(z))
        assert torch.equal(decoder(z), twin(z))

    def test_wrong_shape(self, make: Callable[[], nn.Module]) -> None:
        with pytest.raises(ValueError, match=r"z must have shape \(\*batch, 2\), got \(4, 3\)"):
            make()(torch.zeros(4, 3))


@pytest.mark.parametrize(
    "out_shape", [(1, 8, 8), (1, 28, 20), (30, 28, 28), (100, 32, 32), (3, 86, 86), (2, 1, 1), (1, 5, 7)]
)
@pytest.mark.parametrize("channels", [(4,), (6, 4), (8, 6, 4)])
def test_conv_reaches_any_image_size(out_shape: tuple[int, ...], channels: tuple[int, ...]) -> None:
    decoder = ConvDecoder(3, out_shape, channels=channels, h_dim=8)
    x = decoder(torch.randn(2, 3))
    assert x.shape == (2, *out_shape)
    assert decoder.out_shape == out_shape
    assert x.isfinite().all()


def test_output_is_raw() -> None:
    decoder = MLPDecoder(2, (4,), ())
    z = torch.randn(3, 2)
    torch.testing.assert_close(decoder(1e3 * z) - decoder(0 * z), 1e3 * (decoder(z) - decoder(0 * z)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvDecoder(2, (28, 28)), r"out_shape must have 3 entries, got \(28, 28\)"),
        (lambda: ConvDecoder(2, (1, 28, 28), channels=()), r"channels must hold at least one size, got \(\)"),
        (
            lambda: ConvDecoder(2, (1, 28, 28), channels=(4, 1)),
            "channels must hold sizes of at least 2, got 1",
        ),
        (lambda: ConvDecoder(2, (1, 28, 28), h_dim=0), "h_dim must be positive, got 0"),
        (lambda: MLPDecoder(0, (4,)), "z_dim must be positive, got 0"),
        (lambda: MLPDecoder(2, (4, 0)), r"out_shape must hold positive sizes, got \(4, 0\)"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
