"""The ladder's networks: shapes, the authors' sizes, where they start, and what they refuse."""

import math
from typing import Any

import pytest
import torch

from pvae.nn import BottomUp, LadderSpec, TopDown
from pvae.nn.ladder_block import LOG_VARIANCES

from ..ladders import jolted

_SMALL: dict[str, Any] = {"x_shape": (1, 8, 8), "scales": ((4, 1),), "channels": 4}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_spec_names_its_latents_from_the_top() -> None:
    spec = LadderSpec((1, 28, 28), scales=[[14, 2], [7, 1]])  # type: ignore[arg-type]
    assert spec.names == ("z_3", "z_2", "z_1")
    assert spec.z_shapes == {"z_3": (1, 7, 7), "z_2": (1, 14, 14), "z_1": (1, 14, 14)}
    assert spec.scale_of == (1, 0, 0)
    assert spec.z_dim == 49 + 2 * 196
    assert spec == LadderSpec((1, 28, 28), scales=((14, 2), (7, 1)))
    assert LadderSpec((3, 8, 8), ((4, 1),)).z_shapes == {"z_1": (3, 4, 4)}
    assert LadderSpec((3, 8, 8), ((4, 1),), z_channels=2).z_shapes == {"z_1": (2, 4, 4)}


# What the authors' networks hold (their code at 2d38877, counted by hand), and how many of these numbers
# nothing ever reads: the lift of the last latent and the features that its prior hands on.
PAPER = {
    "mnist": (LadderSpec((1, 28, 28), ((14, 4), (7, 4))), 3, 1, 980, 123_712, 477_489, 2_208),
    "omniglot": (
        LadderSpec((1, 28, 28), ((14, 4), (7, 4)), 80, bottleneck=0.5),
        3,
        1,
        980,
        212_560,
        846_841,
        10_000,
    ),
    "cifar10": (
        LadderSpec((3, 32, 32), ((32, 10), (16, 8), (8, 6), (4, 4)), 128, bottleneck=0.75),
        4,
        100,
        38_208,
        3_054_592,
        16_183_132,
        29_824,
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_configurations_have_the_papers_sizes(name: str) -> None:
    spec, blocks, planes, z_dim, up, down, unread = PAPER[name]
    with torch.device("meta"):
        bottom_up = BottomUp(spec, blocks, "full")
        top_down = TopDown(spec, (planes, *spec.x_shape[1:]), postprocess=0)
    assert spec.z_dim == z_dim
    # The heads of the posteriors, which the authors count with the way down, are here with the way up.
    heads = count(bottom_up.posteriors)
    assert count(bottom_up) - heads == up
    assert count(top_down) + heads == down - unread


def test_features_and_states_broadcast_over_any_batch(float64: None) -> None:
    spec = LadderSpec((2, 8, 8), ((4, 2), (2, 1)), channels=4, z_channels=3)
    bottom_up, top_down = BottomUp(spec), TopDown(spec, (5, 8, 8))
    jolted(bottom_up, top_down)
    x = torch.rand(6, 3, 2, 8, 8)
    features = bottom_up(x)
    assert [tuple(e.shape) for e in features] == [(6, 3, 4, 4, 4), (6, 3, 4, 2, 2)]
    contexts = top_down.contexts(x[:, :1])
    assert contexts is not None
    h, states = top_down.start(), []
    z = [torch.randn(6, 3, *shape) for shape in spec.z_shapes.values()]
    for layer in range(3):
        loc, scale = bottom_up.heads(layer, h, features)
        assert loc.shape == scale.shape == z[layer].shape
        loc, scale, h = top_down.prior(layer, h, contexts)
        assert loc.shape == scale.shape == ((6, 1) if layer == 0 else (6, 3)) + z[layer].shape[2:]
        h = top_down.below(layer, h, z[layer])
        states.append(h)
    assert torch.equal(states[-1], top_down.prior(2, states[1], contexts)[2])  # nothing below reads it
    out = top_down.read_out(z, h)
    assert out.shape == (6, 3, 5, 8, 8)
    # Every image of the batch by itself.
    alone = top_down.read_out([t[4, 1] for t in z], h)
    torch.testing.assert_close(alone, out[4, 1])
    for ours, whole in zip(bottom_up(x[4, 1]), features, strict=True):
        torch.testing.assert_close(ours, whole[4, 1])


def test_heads_start_as_linear_maps_of_what_they_see(float64: None) -> None:
    spec = LadderSpec((1, 8, 8), ((4, 1), (2, 1)), channels=4)
    bottom_up, top_down = BottomUp(spec), TopDown(spec, (1, 8, 8), context=False)
    a, b = (torch.randn(4, 2, 2) for _ in range(2))
    zero = torch.zeros(4, 2, 2)

    def prior(h: torch.Tensor) -> torch.Tensor:
        return top_down.prior(0, h)[0]

    torch.testing.assert_close(prior(a + b), prior(a) + prior(b) - prior(zero))
    features = bottom_up(torch.rand(1, 8, 8))

    def posterior(h: torch.Tensor) -> torch.Tensor:
        return bottom_up.heads(0, h, features)[0]

    torch.testing.assert_close(posterior(a + b), posterior(a) + posterior(b) - posterior(zero))
    skip = bottom_up.posteriors[0].skip
    wanted = skip(((a + features[1]) / math.sqrt(2.0)).unsqueeze(0))[0, :1]  # type: ignore[operator]
    torch.testing.assert_close(posterior(a), wanted)


def test_residual_steps_start_smaller_the_deeper_the_ladder() -> None:
    def sizes(latents: int) -> tuple[float, float]:
        torch.manual_seed(0)
        spec = LadderSpec((1, 8, 8), ((4, latents),), channels=64)
        top_down = TopDown(spec, (1, 8, 8))
        last = torch.stack([block.net[6].weight for block in top_down.blocks])  # type: ignore[index, union-attr]
        lift = torch.stack([lift.weight for lift in top_down.lifts])  # type: ignore[misc]
        return last.std().item(), lift.std().item()

    # torch starts a 1x1 convolution of n channels at U(-1, 1) / sqrt(n).
    for latents in (2, 8):
        last, lift = sizes(latents)
        assert last == pytest.approx(1 / math.sqrt(3 * 64 * latents), rel=0.05)
        assert lift == pytest.approx(1 / math.sqrt(3 * latents), rel=0.3)


def test_scales_stay_within_their_range() -> None:
    spec = LadderSpec((1, 8, 8), ((4, 1),), channels=4)
    bottom_up, top_down = BottomUp(spec), TopDown(spec, (1, 8, 8), context=False)
    jolted(bottom_up, top_down, size=50.0)
    low, high = (math.exp(0.5 * end) for end in LOG_VARIANCES)
    for scale in (
        bottom_up.heads(0, top_down.start(), bottom_up(torch.rand(9, 1, 8, 8)))[1],
        top_down.prior(0, torch.randn(9, 4, 4, 4))[1],
    ):
        assert scale.min().item() == pytest.approx(low)
        assert scale.max().item() == pytest.approx(high)


def test_both_stems_end_on_the_same_planes() -> None:
    spec = LadderSpec((1, 28, 28), ((14, 1), (7, 1)), channels=4)
    x = torch.rand(2, 1, 28, 28)
    for stem in ("full", "conv4"):
        features = BottomUp(spec, 2, stem)(x)
        assert [e.shape[-1] for e in features] == [14, 7]


def test_images_are_centred_as_the_spec_says(float64: None) -> None:
    x = torch.rand(2, 1, 8, 8)
    plain = LadderSpec((1, 8, 8), ((4, 1),), channels=4)
    moved = LadderSpec((1, 8, 8), ((4, 1),), channels=4, centre=0.47, spread=0.25)
    one, other = BottomUp(plain), BottomUp(moved)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x)[0], other(0.47 + 0.25 * (2 * x - 1))[0])
    contexts = TopDown(moved, (1, 8, 8)).contexts(x)
    assert contexts is not None
    torch.testing.assert_close(contexts[0][0, 0, 1, 2], (x[0, 0, 2:4, 4:6].mean() - 0.47) / 0.25)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x_shape": (1, 8, 6)}, r"x_shape must be that of a square image, got \(1, 8, 6\)"),
        ({"scales": ()}, "scales must hold at least one pair"),
        ({"scales": ((4, 2, 1),)}, "a scale must have 2 entries"),
        ({"scales": ((4, 0),)}, "a scale must hold positive sizes"),
        ({"scales": ((3, 1),)}, "must have sides that divide 8 and one another.*got 3 after 8"),
        ({"scales": ((4, 1), (4, 1))}, "got 4 after 4"),
        ({"scales": ((2, 1), (4, 1))}, "got 4 after 2"),
        ({"channels": 0}, "channels must be positive, got 0"),
        ({"z_channels": 0}, "z_channels must be positive, got 0"),
        ({"bottleneck": 0.1}, "bottleneck must leave at least one of 4 channels, got 0.1"),
        ({"bottleneck": -1.0}, "bottleneck must leave"),
        ({"spread": 0.0}, "spread must be positive, got 0.0"),
    ],
)
def test_shapes_that_are_no_ladder_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LadderSpec(**{**_SMALL, **arguments})


def test_networks_refuse_what_does_not_fit() -> None:
    spec = LadderSpec((1, 8, 8), ((4, 1),), channels=4)
    with pytest.raises(ValueError, match="stem must be 'conv4' or 'full', got 'half'"):
        BottomUp(spec, stem="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks must be positive, got 0"):
        BottomUp(spec, 0)
    with pytest.raises(ValueError, match=r"stem 'conv4' halves 8.*multiple of the finest side 8"):
        BottomUp(LadderSpec((1, 8, 8), ((8, 1),)))
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 1, 8, 8\), got \(2, 1, 4, 4\)"):
        BottomUp(spec)(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"out_shape must have the height and width of x, \(8, 8\)"):
        TopDown(spec, (1, 4, 4))
    with pytest.raises(ValueError, match="postprocess must not be negative, got -1"):
        TopDown(spec, (1, 8, 8), postprocess=-1)
    with pytest.raises(ValueError, match="priors see a low-pass image, got none"):
        TopDown(spec, (1, 8, 8)).contexts(None)
    with pytest.raises(ValueError, match="priors see no low-pass image, got one"):
        TopDown(spec, (1, 8, 8), context=False).contexts(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"image must have shape \(\*batch, 1, 8, 8\)"):
        TopDown(spec, (1, 8, 8)).contexts(torch.zeros(2, 1, 4, 4))
