"""Labels: encodings, refusals, and networks that see them."""

import math

import pytest
import torch
from torch import Tensor, nn

from pvae.nn import (
    ConvDecoder,
    ConvEncoder,
    LabelEmbedding,
    LabelSpace,
    MLPDecoder,
    MLPEncoder,
    WhitenedDecoder,
    WhitenedEncoder,
    standardise_,
)
from tests.distributions.tracing import assert_traceable

CLASSES = LabelSpace("class", 4)
ATTRIBUTES = LabelSpace("attributes", 3)
LABELS = {
    "class": (CLASSES, torch.tensor([2, 0, 3])),
    "attributes": (ATTRIBUTES, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])),
}
either = pytest.mark.parametrize(("space", "y"), LABELS.values(), ids=LABELS)
X_SHAPE, Z = (2, 3, 4), 5


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    torch.manual_seed(0)


def encoders(space: LabelSpace) -> dict[str, MLPEncoder | ConvEncoder | WhitenedEncoder]:
    return {
        "mlp": MLPEncoder(X_SHAPE, Z, (6, 7), "tanh", labels=LabelEmbedding(space, 8)),
        "gated": MLPEncoder(X_SHAPE, Z, (6, 7), gated=True, labels=LabelEmbedding(space, 8)),
        "linear": MLPEncoder(X_SHAPE, Z, (), labels=LabelEmbedding(space, 8)),
        "conv": ConvEncoder(X_SHAPE, Z, (4, 6), 7, labels=LabelEmbedding(space, 8)),
        "whitened": WhitenedEncoder(MLPEncoder(X_SHAPE, Z, (6,), labels=LabelEmbedding(space, 8))),
    }


def decoders(space: LabelSpace) -> dict[str, MLPDecoder | ConvDecoder | WhitenedDecoder]:
    return {
        "mlp": MLPDecoder(Z, X_SHAPE, (6, 7), "tanh", labels=LabelEmbedding(space, 8)),
        "gated": MLPDecoder(Z, X_SHAPE, (6, 7), gated=True, labels=LabelEmbedding(space, 8)),
        "linear": MLPDecoder(Z, X_SHAPE, (), labels=LabelEmbedding(space, 8)),
        "conv": ConvDecoder(Z, X_SHAPE, (6, 4), 7, labels=LabelEmbedding(space, 8)),
        "whitened": WhitenedDecoder(MLPDecoder(Z, X_SHAPE, (6,), labels=LabelEmbedding(space, 8))),
    }


every_encoder = pytest.mark.parametrize("name", encoders(CLASSES))
every_decoder = pytest.mark.parametrize("name", decoders(CLASSES))


def test_classes_are_one_hot_and_attributes_stay() -> None:
    y = LABELS["class"][1]
    torch.testing.assert_close(CLASSES.encode(y), nn.functional.one_hot(y, 4).double())
    attributes = LABELS["attributes"][1]
    torch.testing.assert_close(ATTRIBUTES.encode(attributes), attributes.double())
    assert CLASSES.encode(y.expand(2, 3)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("space", "y", "said"),
    [
        (CLASSES, torch.tensor([0, 4]), r"class numbers 0 \.\.\. 3, got 0 \.\.\. 4"),
        (CLASSES, torch.tensor([-1]), r"got -1 \.\.\. -1"),
        (ATTRIBUTES, torch.tensor([[1.0, 0.0, 0.5]]), "attributes 0 or 1, none missing, got 0.5"),
        (ATTRIBUTES, torch.tensor([[1.0, math.nan, 0.0]]), "got nan"),
        (ATTRIBUTES, torch.tensor([[1.0, 0.0]]), r"shape \(\*batch, 3\), got \(1, 2\)"),
    ],
)
def test_labels_outside_the_space_are_refused(space: LabelSpace, y: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        space.check(y)


def test_float_classes_are_refused() -> None:
    with pytest.raises(TypeError, match="class numbers as integers, got torch"):
        CLASSES.check(torch.tensor([0.0, 1.0]))


@either
def test_good_labels_pass(space: LabelSpace, y: Tensor) -> None:
    space.check(y)
    space.check(y[:0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_labels_of_other_types_are_the_same_labels(dtype: torch.dtype) -> None:
    for space, y in LABELS.values():
        if dtype == torch.bool and space is CLASSES:
            continue
        space.check(y.to(dtype))
        for kind in ("mlp", "table"):
            embedding = LabelEmbedding(space, 12, kind)
            assert torch.equal(embedding(y.to(dtype)), embedding(y))


def test_the_space_of_a_data_set() -> None:
    assert LabelSpace.of(10, None) == LabelSpace("class", 10)
    assert LabelSpace.of(None, 7) == LabelSpace("attributes", 7)
    assert LabelSpace.of(None, None) is None
    with pytest.raises(ValueError, match="kind must be"):
        LabelSpace("other", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size must be positive"):
        LabelSpace("class", 0)


@either
@pytest.mark.parametrize("kind", ["mlp", "table"])
def test_an_embedding_tells_labels_apart(space: LabelSpace, y: Tensor, kind: str) -> None:
    embedding = LabelEmbedding(space, 12, kind)  # type: ignore[arg-type]
    e = embedding(y)
    assert e.shape == (3, 12)
    assert (torch.cdist(e, e) + torch.eye(3)).min() > 1e-3
    torch.testing.assert_close(embedding(y[1]), e[1])


def test_a_table_of_attributes_shares_its_two_vectors() -> None:
    embedding = LabelEmbedding(ATTRIBUTES, 6, "table")
    assert sum(p.numel() for p in embedding.parameters()) == 2 * 2
    e = embedding(torch.tensor([1.0, 0.0, 1.0])).reshape(3, 2)
    assert embedding.table is not None
    torch.testing.assert_close(e, embedding.table[torch.tensor([1, 0, 1])])


def test_an_embedding_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="multiple of the 3 attributes"):
        LabelEmbedding(ATTRIBUTES, 7, "table")
    with pytest.raises(ValueError, match="kind must be 'mlp' or 'table'"):
        LabelEmbedding(CLASSES, 7, "other")  # type: ignore[arg-type]


@either
@every_encoder
def test_an_encoder_sees_its_labels(space: LabelSpace, y: Tensor, name: str) -> None:
    encoder = encoders(space)[name]
    x = torch.randn(3, *X_SHAPE)
    loc, scale = encoder(x, y)
    assert loc.shape == scale.shape == (3, Z)
    assert not torch.allclose(loc, encoder(x, y.roll(1, 0))[0])
    with pytest.raises(ValueError, match="y must be given"):
        encoder(x)


@either
@every_decoder
def test_a_decoder_broadcasts_particles_against_labels(space: LabelSpace, y: Tensor, name: str) -> None:
    decoder = decoders(space)[name]
    z = torch.randn(4, 3, Z)
    out = decoder(z, y)
    assert out.shape == (4, 3, *X_SHAPE)
    for k in range(4):
        torch.testing.assert_close(out[k], decoder(z[k], y))
    assert not torch.allclose(out, decoder(z, y.roll(1, 0)))
    with pytest.raises(ValueError, match="y must be given"):
        decoder(z)


@every_encoder
def test_an_encoder_broadcasts_both_ways(name: str) -> None:
    encoder, y = encoders(CLASSES)[name], LABELS["class"][1]
    x = torch.randn(3, *X_SHAPE)
    many_labels = encoder(x, y.unsqueeze(1))[0]
    assert many_labels.shape == (3, 3, Z)
    torch.testing.assert_close(many_labels[2, 1], encoder(x[1], y[2])[0])


def test_the_split_product_is_concatenation() -> None:
    y = LABELS["class"][1]
    decoder = MLPDecoder(Z, X_SHAPE, (6,), "tanh", labels=LabelEmbedding(CLASSES, 8))
    z = torch.randn(3, Z)
    assert decoder.labels is not None
    joined = torch.cat([z, decoder.labels(y)], -1)
    torch.testing.assert_close(decoder(z, y), decoder.mlp(joined).unflatten(-1, X_SHAPE))


@either
@every_decoder
def test_labels_are_traceable(space: LabelSpace, y: Tensor, name: str) -> None:
    decoder = decoders(space)[name]
    one, other = torch.randn(2, 3, Z).unbind()
    assert_traceable(decoder, (one.requires_grad_(), y), (other.requires_grad_(), y.roll(1, 0)))


def test_networks_without_labels_pass_them_over() -> None:
    x, z, y = torch.randn(3, *X_SHAPE), torch.randn(3, Z), LABELS["class"][1]
    for encoder in (MLPEncoder(X_SHAPE, Z), ConvEncoder(X_SHAPE, Z, (4,), 7)):
        torch.testing.assert_close(encoder(x, y), encoder(x))
    for decoder in (MLPDecoder(Z, X_SHAPE), ConvDecoder(Z, X_SHAPE, (4,), 7)):
        torch.testing.assert_close(decoder(z, y), decoder(z))


def test_whitened_networks_are_the_wrapped_ones_in_other_units() -> None:
    loc, scale = torch.randn(Z), torch.rand(Z) + 0.5
    encoder, decoder = MLPEncoder(X_SHAPE, Z), MLPDecoder(Z, X_SHAPE)
    white, back = WhitenedEncoder(encoder), WhitenedDecoder(decoder)
    white.set_(loc, scale)
    back.set_(loc, scale)
    x, z = torch.randn(3, *X_SHAPE), torch.randn(4, 3, Z)
    alpha, beta = encoder(x)
    mu, sigma = white(x)
    torch.testing.assert_close((mu - loc) / scale, alpha)
    torch.testing.assert_close(sigma / scale, beta)
    torch.testing.assert_close(back(loc + scale * z), decoder(z))
    assert set(white.state_dict()) == {f"encoder.{n}" for n in encoder.state_dict()} | {"loc", "scale"}
    with pytest.raises(ValueError, match="scale must be positive"):
        white.set_(loc, torch.zeros(Z))


@pytest.mark.parametrize("net", ["mlp", "gated", "linear", "conv"])
def test_standardised_codes_leave_reconstructions_unchanged(net: str) -> None:
    encoder = MLPEncoder(X_SHAPE, Z, (9,))
    decoder: MLPDecoder | ConvDecoder
    if net == "conv":
        decoder = ConvDecoder(Z, X_SHAPE, (4,), 7)
    else:
        decoder = MLPDecoder(Z, X_SHAPE, () if net == "linear" else (6,), gated=net == "gated")
    x = 5 * torch.randn(200, *X_SHAPE)
    code, scale_head = encoder(x)
    before = decoder(code)
    standardise_(encoder, decoder, code.mean(0), code.std(0))
    after, same = encoder(x)
    torch.testing.assert_close(after.mean(0), torch.zeros(Z), atol=1e-12, rtol=0)
    torch.testing.assert_close(after.std(0), torch.ones(Z))
    torch.testing.assert_close(same, scale_head)
    torch.testing.assert_close(decoder(after), before, rtol=1e-9, atol=1e-10)
