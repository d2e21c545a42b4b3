"""The mixture against sums over levels, decimals of 60 digits, PixelCNN++'s own formula, and its draws."""

import copy
import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pyro
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from pvae.distributions import DiscretizedLogisticMixture, LevelGrid
from tests.distributions.tracing import assert_traceable, host_syncs


def mixture(
    batch: tuple[int, ...] = (),
    components: int = 3,
    channels: int = 3,
    plane: tuple[int, int] = (1, 1),
    levels: int = 4,
    dtype: torch.dtype = torch.float64,
    log_scale: float = -1.5,
) -> DiscretizedLogisticMixture:
    shape = (*batch, components, channels, *plane)
    pairs = (*batch, components, channels * (channels - 1) // 2, *plane)
    return DiscretizedLogisticMixture(
        torch.randn(*batch, components, *plane, dtype=dtype),
        torch.rand(shape, dtype=dtype) * 1.4 - 0.2,
        (torch.randn(shape, dtype=dtype) * 0.5 + log_scale).exp(),
        torch.randn(pairs, dtype=dtype) if channels > 1 else None,
        levels,
    )


def every_image(channels: int, levels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """All images of one pixel, shape (levels ** channels, channels, 1, 1)."""
    grid = torch.tensor(list(itertools.product(range(levels), repeat=channels)), dtype=dtype)
    return grid[..., None, None] / (levels - 1)


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 17), (1, 256), (2, 5), (3, 4), (3, 7)])
@pytest.mark.parametrize("log_scale", [-1.5, -9.0, 4.0])
def test_masses_of_all_images_sum_to_one(channels: int, levels: int, log_scale: float) -> None:
    d = mixture(channels=channels, levels=levels, log_scale=log_scale)
    total = d.log_prob(every_image(channels, levels)).logsumexp(0)
    assert total.item() == pytest.approx(0.0, abs=1e-12)


def test_conditionals_of_an_rgb_pixel_sum_to_one_over_256_levels() -> None:
    # sum over blue of P(r, g, b), then over green, then over red: the chain, along random prefixes.
    d = mixture(components=2, levels=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    assert d.coefficients is not None
    marginal_rg = DiscretizedLogisticMixture(d.logits, d.loc[:, :2], d.scale[:, :2], d.coefficients[:, :1])
    marginal_r = DiscretizedLogisticMixture(d.logits, d.loc[:, :1], d.scale[:, :1])
    for red, green in torch.rand(5, 2, dtype=torch.float64).mul(255).round() / 255:
        blues = torch.stack([red.expand(256), green.expand(256), levels], 1)[..., None, None]
        rg = torch.stack([red, green])[..., None, None]
        torch.testing.assert_close(
            d.log_prob(blues).logsumexp(0), marginal_rg.log_prob(rg), atol=1e-11, rtol=0
        )
        greens = torch.stack([red.expand(256), levels], 1)[..., None, None]
        total = marginal_rg.log_prob(greens).logsumexp(0)
        torch.testing.assert_close(total, marginal_r.log_prob(red.reshape(1, 1, 1)), atol=1e-11, rtol=0)
    assert marginal_r.log_prob(levels.reshape(256, 1, 1, 1)).logsumexp(0).item() == pytest.approx(
        0, abs=1e-12
    )


def test_log_prob_equals_pixelcnn_on_minus_one_to_one() -> None:
    """The formula as PixelCNN++ writes it, on pixels scaled to [-1, 1], in NumPy."""
    d = mixture(batch=(5,), components=4, plane=(2, 3), levels=256, log_scale=-1.0)
    x = (torch.rand(5, 3, 2, 3, dtype=torch.float64) * 255).round() / 255
    x[:, :, 0, 0], x[:, :, 1, 1] = 0.0, 1.0  # the open bins
    log_prob = d.log_prob(x)
    assert d.coefficients is not None
    y = 2 * x.numpy() - 1
    mean = 2 * d.loc.numpy() - 1
    scale = 2 * d.scale.numpy()
    a = d.coefficients.numpy()
    m1 = mean[:, :, 0]
    m2 = mean[:, :, 1] + a[:, :, 0] * y[:, None, 0]
    m3 = mean[:, :, 2] + a[:, :, 1] * y[:, None, 0] + a[:, :, 2] * y[:, None, 1]
    total = special.log_softmax(d.logits.numpy(), axis=1)
    for c, m in enumerate((m1, m2, m3)):
        centre = y[:, None, c]
        upper = np.where(centre >= 1, 1.0, special.expit((centre + 1 / 255 - m) / scale[:, :, c]))
        lower = np.where(centre <= -1, 0.0, special.expit((centre - 1 / 255 - m) / scale[:, :, c]))
        total = total + np.log(upper - lower)
    expected = special.logsumexp(total, axis=1).sum((-2, -1))
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("log_scale", [-12.0, -8.0, -4.0, 0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_scales_and_far_tails_against_sixty_digits(log_scale: float, dtype: torch.dtype) -> None:
    levels = 256
    scale = torch.tensor(log_scale).exp()  # single precision in both cases: the same model
    loc = torch.tensor(0.3712)
    d = DiscretizedLogisticMixture(
        torch.zeros(1, 1, 1, dtype=dtype),
        loc.to(dtype).reshape(1, 1, 1, 1),
        scale.to(dtype).reshape(1, 1, 1, 1),
    )
    ours = d.log_prob(every_image(1, levels, dtype))
    assert ours.isfinite().all()
    with localcontext() as context:
        context.prec = 60
        context.Emin = -(10**8)

        def cdf(edge: int) -> Decimal:
            t = (Decimal(2 * edge - 1) / (2 * (levels - 1)) - Decimal(loc.item())) / Decimal(scale.item())
            return 1 / (1 + (-t).exp()) if t > 0 else t.exp() / (1 + t.exp())

        def survival(edge: int) -> Decimal:
            t = (Decimal(2 * edge - 1) / (2 * (levels - 1)) - Decimal(loc.item())) / Decimal(scale.item())
            return 1 / (1 + t.exp()) if t < 0 else (-t).exp() / (1 + (-t).exp())

        for level in (0, 1, 50, 94, 95, 96, 200, 254, 255):
            # Differences on the side where both terms are small lose nothing.
            if level == 0:
                mass = cdf(1)
            elif level == levels - 1:
                mass = survival(level)
            elif level < 95:
                mass = cdf(level + 1) - cdf(level)
            else:
                mass = survival(level) - survival(level + 1)
            expected = float(mass.ln())
            # In single precision the argument of the logistic has a relative error of a few 1e-7.
            slack = (3e-6 if dtype == torch.float32 else 1e-12) * (1 + abs(expected) + 1 / scale.item())
            assert ours[level].item() == pytest.approx(expected, abs=slack)


def test_single_precision_agrees_with_double() -> None:
    single = mixture(batch=(20,), components=10, plane=(8, 8), levels=256, dtype=torch.float32, log_scale=-3)
    assert single.coefficients is not None
    double = DiscretizedLogisticMixture(
        single.logits.double(), single.loc.double(), single.scale.double(), single.coefficients.double()
    )
    x = single.sample()
    error = (single.log_prob(x).double() - double.log_prob(x.double())).abs() / x[0].numel()
    assert error.max() < 1e-5


@pytest.mark.parametrize(("channels", "levels"), [(1, 5), (2, 3), (3, 3)])
def test_samples_follow_the_masses(channels: int, levels: int) -> None:
    d = mixture(channels=channels, levels=levels)
    images = every_image(channels, levels)
    x = d.sample(torch.Size([20000]))
    assert LevelGrid(levels).check(x).all()
    digits = (x.flatten(1) * (levels - 1)).round().long()
    code = (digits * levels ** torch.arange(channels - 1, -1, -1)).sum(1)
    expected = 20000 * d.log_prob(images).exp().numpy()
    enough = expected > 5
    observed = np.bincount(code.numpy(), minlength=levels**channels)
    assert enough.sum() >= 4
    cells = [np.append(v[enough], v[~enough].sum()) for v in (observed, expected)]
    keep = cells[1] > 1
    assert (
        stats.chisquare(cells[0][keep], cells[1][keep] * cells[0][keep].sum() / cells[1][keep].sum()).pvalue
        > 1e-3
    )


def test_pixels_are_independent_and_have_their_own_parameters() -> None:
    d = mixture(batch=(2,), channels=3, plane=(2, 2))
    x = d.sample()
    parts = [
        DiscretizedLogisticMixture(
            d.logits[..., i : i + 1, j : j + 1],
            d.loc[..., i : i + 1, j : j + 1],
            d.scale[..., i : i + 1, j : j + 1],
            d.coefficients[..., i : i + 1, j : j + 1],  # type: ignore[index]
            d.levels,
        ).log_prob(x[..., i : i + 1, j : j + 1])
        for i in range(2)
        for j in range(2)
    ]
    torch.testing.assert_close(d.log_prob(x), torch.stack(parts).sum(0))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("log_scale", [-9.0, -2.0, 3.0])
def test_grey_mean_is_the_sum_over_levels(levels: int, log_scale: float) -> None:
    d = mixture(channels=1, levels=levels, log_scale=log_scale)
    images = every_image(1, levels)
    expected = (d.log_prob(images).exp() * images.flatten()).sum()
    torch.testing.assert_close(d.mean, expected.reshape(1, 1, 1), rtol=0, atol=1e-12)


def test_rgb_mean_is_the_mean_given_the_means_before() -> None:
    d = mixture(components=2, channels=3, levels=6)
    grid = np.arange(6) / 5
    assert d.coefficients is not None
    loc, scale, a = (t.squeeze((-2, -1)).numpy() for t in (d.loc, d.scale, d.coefficients))
    weights = special.softmax(d.logits.squeeze((-2, -1)).numpy())

    def level_mean(m: float, s: float) -> float:
        edges = np.concatenate([[0.0], special.expit(((grid[1:] + grid[:-1]) / 2 - m) / s), [1.0]])
        return float(np.diff(edges) @ grid)

    expected = np.zeros(3)
    for k in range(2):
        red = level_mean(loc[k, 0], scale[k, 0])
        green = level_mean(loc[k, 1] + a[k, 0] * (red - 0.5), scale[k, 1])
        blue = level_mean(loc[k, 2] + a[k, 1] * (red - 0.5) + a[k, 2] * (green - 0.5), scale[k, 2])
        expected += weights[k] * np.array([red, green, blue])
    np.testing.assert_allclose(d.mean.flatten().numpy(), expected, atol=1e-12)


def test_rgb_mean_is_that_of_the_draws_where_nothing_clips() -> None:
    d = DiscretizedLogisticMixture(
        torch.tensor([0.0, 1.0])[:, None, None],
        torch.tensor([[0.4, 0.5, 0.6], [0.6, 0.5, 0.4]])[..., None, None],
        torch.full((2, 3, 1, 1), 0.02),
        torch.tensor([[0.8, -0.5, 0.5], [-0.8, 0.3, 0.5]])[..., None, None],
    )
    x = d.sample(torch.Size([20000]))
    error = 5 * x.std(0) / math.sqrt(20000)
    assert ((x.mean(0) - d.mean).abs() < error).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(channels: int) -> None:
    d = mixture(batch=(4,), channels=channels, plane=(2, 3))
    event = (channels, 2, 3)
    assert (d.batch_shape, d.event_shape) == ((4,), event)
    wide = d.expand(torch.Size([5, 4]))
    assert isinstance(wide, DiscretizedLogisticMixture)
    x = wide.sample(torch.Size([7]))
    assert x.shape == (7, 5, 4, *event)
    assert wide.mean.shape == (5, 4, *event)
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x))
    torch.testing.assert_close(wide.mean[2], d.mean)
    assert d.support.event_dim == 3


def test_parameters_broadcast_over_the_batch() -> None:
    d = mixture(batch=(4,), plane=(2, 3))
    shared = DiscretizedLogisticMixture(d.logits[0], d.loc, d.scale[:1], d.coefficients, d.levels)
    assert shared.batch_shape == (4,)
    x = shared.sample()
    full = DiscretizedLogisticMixture(
        d.logits[:1].expand(4, -1, -1, -1), d.loc, d.scale[:1].expand_as(d.loc), d.coefficients, d.levels
    )
    torch.testing.assert_close(shared.log_prob(x), full.log_prob(x))
    assert shared.mean.shape == x.shape


def test_gradients() -> None:
    d = mixture(components=2, plane=(1, 2), levels=8)
    x = d.sample(torch.Size([3]))
    x[0, :, 0, 0], x[1, :, 0, 0] = 0.0, 1.0
    assert d.coefficients is not None
    leaves = [t.requires_grad_() for t in (d.logits, d.loc, d.scale, d.coefficients)]

    def outputs(logits: Tensor, loc: Tensor, scale: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        again = DiscretizedLogisticMixture(logits, loc, scale, coefficients, levels=8)
        return again.log_prob(x), again.mean

    assert torch.autograd.gradcheck(outputs, leaves)


def test_gradients_stay_finite_in_single_precision() -> None:
    x = every_image(1, 256, torch.float32)
    for log_scale in (-12.0, 12.0):
        loc = torch.full((1, 1, 1, 1), 0.4, requires_grad=True)
        rho = torch.full((1, 1, 1, 1), log_scale, requires_grad=True)
        d = DiscretizedLogisticMixture(torch.zeros(1, 1, 1), loc, rho.exp())
        for gradient in torch.autograd.grad(d.log_prob(x).sum(), (loc, rho)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_traceable(channels: int) -> None:
    def log_prob(x: Tensor, *parts: Tensor) -> Tensor:
        logits, loc, scale = parts[:3]
        coefficients = parts[3] if channels > 1 else None
        return DiscretizedLogisticMixture(logits, loc, scale, coefficients, levels=4).log_prob(x)

    inputs = []
    for _ in range(2):
        d = mixture(batch=(2,), channels=channels, plane=(2, 2), dtype=torch.float32)
        parts = [t for t in (d.logits, d.loc, d.scale, d.coefficients) if t is not None]
        inputs.append((d.sample(), *parts))
    for tensor in inputs[0][1:]:
        tensor.requires_grad_()
    assert_traceable(log_prob, *inputs)
    with pyro.validation_enabled(False):
        d = mixture(channels=channels)
        assert host_syncs(lambda: (d.sample(), d.mean)) == []


def test_deepcopy() -> None:
    d = mixture()
    x = d.sample()
    assert torch.equal(copy.deepcopy(d).log_prob(x), d.log_prob(x))


def test_validation() -> None:
    with pyro.validation_enabled(True):
        d = mixture(channels=1, levels=256)
        with pytest.raises(ValueError, match="support"):
            d.log_prob(torch.full((1, 1, 1), 0.5012, dtype=torch.float64))
        with pytest.raises(ValueError, match="support"):
            d.log_prob(torch.full((1, 1, 1), 256 / 255, dtype=torch.float64))
        with pytest.raises(ValueError, match="scale"):
            DiscretizedLogisticMixture(d.logits, d.loc, -d.scale)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_grid(levels: int) -> None:
    single = torch.arange(levels, dtype=torch.float32) / (levels - 1)
    assert LevelGrid(levels).check(single).all()
    between = (torch.arange(-1, levels) + 0.5) / (levels - 1)
    assert not LevelGrid(levels).check(between).any()
    assert not LevelGrid(levels).check(torch.tensor([math.nan, math.inf, 2.0, -1.0])).any()


def test_bad_arguments() -> None:
    d = mixture()
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        DiscretizedLogisticMixture(d.logits, d.loc, d.scale, levels=1)
    message = r"logits, loc, scale, coefficients must have shapes .* got \(3, 1, 1\), "
    with pytest.raises(ValueError, match=message + r"\(3, 3, 1, 1\), \(3, 2, 1, 1\), None"):
        DiscretizedLogisticMixture(d.logits, d.loc, d.scale[:, :2])
    with pytest.raises(ValueError, match=message + r"\(3, 3, 1, 1\), \(3, 3, 1, 1\), \(3, 2, 1, 1\)"):
        DiscretizedLogisticMixture(d.logits, d.loc, d.scale, d.loc[:, :2])
    with pytest.raises(ValueError, match="must have shapes"):
        DiscretizedLogisticMixture(d.logits[0, 0], d.loc, d.scale)
