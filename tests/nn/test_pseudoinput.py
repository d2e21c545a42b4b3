"""Pseudoinputs: the transform against SciPy, measured scales, facts about real digits, the alternatives."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import fft
from torch import Tensor
from torch.nn import functional as F

from pvae.data import Data, Split, from_tensors, load
from pvae.data.streaming import from_datasets
from pvae.nn import DCTPseudoinput, DownsampledPseudoinput, LinearPseudoinput, Pseudoinput
from tests.data.conftest import real_root
from tests.distributions.tracing import assert_traceable

# Channels, height and width all differ: no mix-up of axes goes unseen.
SHAPE = (2, 12, 10)


def dct(
    x_shape: tuple[int, ...] = SHAPE, size: int = 4, scale: float = 3.0, **options: Any
) -> DCTPseudoinput:
    measured = scale + torch.arange(x_shape[0] * size * size, dtype=torch.float64) / 7
    return DCTPseudoinput(x_shape, size, measured.reshape(x_shape[0], size, size), **options)


def wide(x_shape: tuple[int, ...] = SHAPE, size: int = 4) -> DCTPseudoinput:
    """A transform that clips nothing."""
    return dct(x_shape, size, scale=100.0, bounds=(-100.0, 100.0))


MAKERS: list[Callable[[], Pseudoinput]] = [
    dct,
    lambda: DownsampledPseudoinput(SHAPE, 4).double(),
    lambda: DownsampledPseudoinput(SHAPE, 4, mode="bilinear").double(),
    lambda: LinearPseudoinput(SHAPE, 4).double(),
]
NAMES = ["dct", "average", "bilinear", "linear"]


def image(*batch: int) -> Tensor:
    return torch.rand(*batch, *SHAPE, dtype=torch.float64)


def low_pass(x: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Coefficients beyond the first ``size`` of each axis removed, by SciPy."""
    kept = np.zeros_like(x)
    kept[..., :size, :size] = fft.dctn(x, axes=(-2, -1), norm="ortho")[..., :size, :size]
    return np.asarray(fft.idctn(kept, axes=(-2, -1), norm="ortho"))


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
class TestEvery:
    @pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 0)])
    def test_leading_dimensions(self, make: Callable[[], Pseudoinput], batch: tuple[int, ...]) -> None:
        f = make()
        x = image(*batch)
        u = f(x)
        assert u.shape == (*batch, *f.u_shape) == (*batch, 2, 4, 4)
        torch.testing.assert_close(u.reshape(-1, *f.u_shape), f(x.reshape(-1, *SHAPE)))
        u = torch.randn(*batch, *f.u_shape, dtype=torch.float64)
        back = f.context(u)
        assert back.shape == (*batch, *SHAPE)
        torch.testing.assert_close(back.reshape(-1, *SHAPE), f.context(u.reshape(-1, *f.u_shape)))

    def test_the_context_stays_within_its_bounds(self, make: Callable[[], Pseudoinput]) -> None:
        f = make()
        back = f.context(20 * torch.randn(50, *f.u_shape, dtype=torch.float64))
        assert back.min() == 0.0
        assert back.max() == 1.0

    def test_traceable(self, make: Callable[[], Pseudoinput]) -> None:
        f = make()

        def there_and_back(x: Tensor) -> Tensor:
            return f.context(f(x) + 0.1)

        assert_traceable(there_and_back, (image(3).requires_grad_(),), (image(3),))

    def test_state_dict_and_deepcopy(self, make: Callable[[], Pseudoinput]) -> None:
        f, other = make(), make()
        for tensor in f.state_dict().values():
            tensor += 0.01
        other.load_state_dict(f.state_dict())
        x = image(3)
        assert torch.equal(f(x), other(x))
        assert torch.equal(f(x), copy.deepcopy(f)(x))
        assert torch.equal(f.context(f(x)), other.context(other(x)))

    def test_wrong_shapes(self, make: Callable[[], Pseudoinput]) -> None:
        f = make()
        with pytest.raises(
            ValueError, match=r"x must have shape \(\*batch, 2, 12, 10\), got \(3, 2, 10, 12\)"
        ):
            f(torch.zeros(3, 2, 10, 12))
        with pytest.raises(ValueError, match=r"u must have shape \(\*batch, 2, 4, 4\), got \(3, 4, 4\)"):
            f.context(torch.zeros(3, 4, 4))


class TestDCT:
    @pytest.mark.parametrize(
        ("x_shape", "size"), [(SHAPE, 4), (SHAPE, 10), ((1, 28, 28), 7), ((3, 32, 32), 7)]
    )
    def test_equals_scipy(self, x_shape: tuple[int, ...], size: int) -> None:
        f = dct(x_shape, size)
        x = torch.rand(5, *x_shape, dtype=torch.float64)
        expected = fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")[..., :size, :size] / f.scale.numpy()
        assert (np.abs(expected) > 1).any()  # the clamp is tested too
        np.testing.assert_allclose(f(x).numpy(), np.clip(expected, -1, 1), rtol=0, atol=1e-14)

    @pytest.mark.parametrize(("x_shape", "size"), [(SHAPE, 4), ((1, 28, 28), 7), ((3, 32, 32), 7)])
    def test_the_way_back_equals_scipy(self, x_shape: tuple[int, ...], size: int) -> None:
        f = dct(x_shape, size)
        u = torch.rand(5, *f.u_shape, dtype=torch.float64) - 0.3
        padded = np.zeros((5, *x_shape))
        padded[..., :size, :size] = u.numpy() * f.scale.numpy()
        expected = fft.idctn(padded, axes=(-2, -1), norm="ortho")
        assert ((expected < 0) | (expected > 1)).any()
        np.testing.assert_allclose(f.context(u).numpy(), np.clip(expected, 0, 1), rtol=0, atol=2e-14)

    def test_mean_of_an_image_of_ones(self) -> None:
        f = DCTPseudoinput((1, 28, 28), 7, torch.full((1, 7, 7), 28.0, dtype=torch.float64))
        expected = torch.zeros(1, 7, 7, dtype=torch.float64)
        expected[0, 0, 0] = 1.0
        torch.testing.assert_close(
            f(torch.ones(1, 28, 28, dtype=torch.float64)), expected, rtol=0, atol=1e-14
        )

    def test_all_coefficients_are_exactly_invertible(self) -> None:
        x_shape = (3, 9, 9)
        x = torch.rand(4, *x_shape, dtype=torch.float64)
        f = wide(x_shape, 9)
        torch.testing.assert_close(f.context(f(x)), x, rtol=0, atol=1e-13)
        f = DCTPseudoinput(x_shape, 9, torch.full((3, 9, 9), 9.0, dtype=torch.float64))
        torch.testing.assert_close(f.context(f(x)), x, rtol=0, atol=1e-13)

    def test_parseval(self) -> None:
        f = wide((2, 10, 10), 10)
        x = torch.rand(4, 2, 10, 10, dtype=torch.float64)
        energy = (f(x) * f.scale).square().sum((-3, -2, -1))
        torch.testing.assert_close(energy, x.square().sum((-3, -2, -1)), rtol=1e-13, atol=0)

    def test_there_and_back_is_an_orthogonal_projection(self) -> None:
        f = wide()
        basis = torch.eye(12 * 10, dtype=torch.float64).reshape(-1, 1, 12, 10).expand(-1, *SHAPE)
        projection = f.context(f(basis))[:, 1].reshape(120, 120)
        torch.testing.assert_close(projection @ projection, projection, rtol=0, atol=1e-13)
        torch.testing.assert_close(projection, projection.mT, rtol=0, atol=1e-14)
        assert torch.linalg.matrix_rank(projection) == 16

    def test_the_context_is_the_low_pass_image(self) -> None:
        x = image(3)
        f = wide()
        np.testing.assert_allclose(f.context(f(x)).numpy(), low_pass(x.numpy(), 4), rtol=0, atol=1e-13)

    def test_share_clipped(self) -> None:
        f, x = dct(), image(40)
        coefficients = fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")[..., :4, :4]
        expected = (np.abs(coefficients) > f.scale.numpy()).mean()
        assert 0.01 < expected < 0.5
        assert f.share_clipped(x).item() == pytest.approx(expected, rel=1e-12)
        with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 2, 12, 10\)"):
            f.share_clipped(torch.zeros(3, 12, 10))

    def test_type_and_storage(self) -> None:
        scale = torch.full((2, 4, 4), 3.0)
        f = DCTPseudoinput(SHAPE, 4, scale)
        assert f(torch.rand(2, *SHAPE)).dtype == torch.float32
        assert list(f.state_dict()) == ["scale"]
        assert list(f.parameters()) == []
        scale.zero_()
        assert (f.scale == 3.0).all()

    @pytest.mark.parametrize(
        ("scale", "message"),
        [
            (torch.ones(4, 4), r"scale must have shape \(2, 4, 4\), got \(4, 4\)"),
            (torch.zeros(2, 4, 4), "scale must be positive and finite, got 0"),
            (torch.full((2, 4, 4), -2.5), "scale must be positive and finite, got -2.5"),
            (torch.full((2, 4, 4), torch.nan), "scale must be positive and finite, got nan"),
            (torch.full((2, 4, 4), torch.inf), "scale must be positive and finite, got inf"),
        ],
    )
    def test_bad_scale(self, scale: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DCTPseudoinput(SHAPE, 4, scale)


@pytest.mark.parametrize(
    "make",
    [
        lambda x_shape, size, **options: DCTPseudoinput(x_shape, size, torch.ones(2, 4, 4), **options),
        DownsampledPseudoinput,
        LinearPseudoinput,
    ],
    ids=["dct", "downsampled", "linear"],
)
class TestBadArguments:
    @pytest.mark.parametrize(
        ("x_shape", "size", "message"),
        [
            (SHAPE, 0, "size must be positive, got 0"),
            (SHAPE, 11, r"size must be at most 10, the shorter side of x_shape \(2, 12, 10\), got 11"),
            ((12, 10), 4, r"x_shape must have 3 entries, got \(12, 10\)"),
            ((2, 12, 0), 4, r"x_shape must hold positive sizes, got \(2, 12, 0\)"),
        ],
    )
    def test_sizes(
        self, make: Callable[..., Pseudoinput], x_shape: tuple[int, ...], size: int, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            make(x_shape, size)

    def test_size_of_another_type(self, make: Callable[..., Pseudoinput]) -> None:
        with pytest.raises(TypeError, match=r"size must be an int, got 4\.0"):
            make(SHAPE, 4.0)

    @pytest.mark.parametrize("bounds", [(1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
    def test_bounds(self, make: Callable[..., Pseudoinput], bounds: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match="bounds must be in order, got"):
            make(SHAPE, 4, bounds=bounds)


class TestAlternatives:
    @pytest.mark.parametrize("mode", ["average", "bilinear"])
    def test_equals_torch(self, mode: Any) -> None:
        f, x = DownsampledPseudoinput(SHAPE, 4, mode).double(), image(5)
        expected = (
            F.adaptive_avg_pool2d(x, 4)
            if mode == "average"
            else F.interpolate(x, size=(4, 4), mode="bilinear", align_corners=False)
        )
        torch.testing.assert_close(f(x), expected, rtol=0, atol=1e-6)  # its matrices were made in float32
        u = torch.rand(5, 2, 4, 4, dtype=torch.float64)
        up = F.interpolate(u, size=(12, 10), mode="bilinear", align_corners=False)
        torch.testing.assert_close(f.context(u), up, rtol=0, atol=1e-6)

    def test_average_by_hand(self) -> None:
        x = image(3)[..., :8]
        f = DownsampledPseudoinput((2, 12, 8), 4).double()
        expected = x.numpy().reshape(3, 2, 4, 3, 4, 2).mean((3, 5))
        np.testing.assert_allclose(f(x).numpy(), expected, rtol=0, atol=1e-7)

    def test_downsampling_has_nothing_to_learn_or_save(self) -> None:
        f = DownsampledPseudoinput(SHAPE, 4)
        assert list(f.parameters()) == []
        assert f.state_dict() == {}

    def test_a_constant_image_survives(self) -> None:
        for f in (DownsampledPseudoinput(SHAPE, 4), DownsampledPseudoinput(SHAPE, 4, mode="bilinear")):
            x = torch.full(SHAPE, 0.3)
            torch.testing.assert_close(f.context(f(x)), x)

    def test_another_mode(self) -> None:
        with pytest.raises(ValueError, match="mode must be 'average' or 'bilinear', got 'nearest'"):
            DownsampledPseudoinput(SHAPE, 4, mode="nearest")  # type: ignore[arg-type]

    def test_the_learned_map_starts_at_averages(self) -> None:
        f, start = LinearPseudoinput(SHAPE, 4), DownsampledPseudoinput(SHAPE, 4)
        x = torch.rand(5, *SHAPE)
        torch.testing.assert_close(f(x), start(x))
        u = torch.rand(5, 2, 4, 4)
        torch.testing.assert_close(f.context(u), start.context(u))

    def test_the_learned_map_is_affine(self) -> None:
        f, x = LinearPseudoinput(SHAPE, 4).double(), image(5)
        for parameter in f.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
        weight, shift, _, _ = (p.detach().numpy() for p in f.parameters())
        expected = x.numpy().reshape(5, -1) @ weight.T + shift
        np.testing.assert_allclose(f(x).detach().numpy().reshape(5, -1), expected, rtol=0, atol=1e-13)

    def test_gradients_reach_every_parameter(self) -> None:
        f = LinearPseudoinput(SHAPE, 4).double()
        f.context(f(image(5))).square().sum().backward()
        for name, parameter in f.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def grey(n: int = 250, side: int = 9) -> Tensor:
    """Smooth images of 256 levels: their coefficients spread."""
    x = torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(2))
    x = F.avg_pool2d(x, 3, stride=1, padding=1)
    return (255 * torch.sigmoid(6 * x)).to(torch.uint8)


def expected_scale(x: Tensor, size: int) -> NDArray[np.float64]:
    coefficients = fft.dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")[..., :size, :size]
    return np.maximum(1.0, np.abs(np.floor(np.round(coefficients, 9))).max(0))


class TestFromData:
    @pytest.mark.parametrize("batch_size", [7, 250, 1000])
    def test_equals_scipy(self, batch_size: int) -> None:
        split = from_tensors(grey()).train
        f = DCTPseudoinput.from_data(split, 5, batch_size=batch_size)
        np.testing.assert_array_equal(f.scale.numpy(), expected_scale(split.x, 5))
        assert len(f.scale.unique()) > 3
        assert f.scale.min() == 1.0
        assert f.scale.dtype == torch.float32
        assert (f.x_shape, f.u_shape, f.bounds) == ((1, 9, 9), (1, 5, 5), (0.0, 1.0))

    def test_a_smaller_size_has_a_corner_of_the_scale(self) -> None:
        split = from_tensors(grey()).train
        larger, smaller = (DCTPseudoinput.from_data(split, size).scale for size in (7, 4))
        assert torch.equal(larger[:, :4, :4], smaller)

    def test_each_channel_has_its_own(self) -> None:
        x = torch.cat([grey(), grey() // 4, torch.zeros_like(grey())], dim=1)
        scale = DCTPseudoinput.from_data(from_tensors(x).train, 5).scale
        np.testing.assert_array_equal(scale.numpy(), expected_scale(x / 255, 5))
        assert (scale[2] == 1).all()
        assert scale[1].max() < scale[0].max()

    def test_dynamic_binarisation_is_measured_as_it_is_seen(self) -> None:
        split = from_tensors(grey(), binarize="dynamic").train
        state = torch.get_rng_state()
        first = DCTPseudoinput.from_data(split, 5, batch_size=60)
        assert torch.equal(torch.get_rng_state(), state)
        np.testing.assert_array_equal(first.scale.numpy(), expected_scale(split.x, 5))
        assert torch.equal(DCTPseudoinput.from_data(split, 5).scale, first.scale)
        # A scale that is measured on the grey images clips more of what is seen than this one does.
        seen = split.sample(torch.arange(250)).x
        clipped = DCTPseudoinput.from_data(split, 5, grey=True)
        assert first.share_clipped(seen) < 0.5 * clipped.share_clipped(seen)

    def test_grey(self) -> None:
        split = from_tensors(grey(), binarize="dynamic").train
        f = DCTPseudoinput.from_data(split, 5, grey=True)
        np.testing.assert_array_equal(f.scale.numpy(), expected_scale(grey() / 255, 5))
        assert not torch.equal(f.scale, DCTPseudoinput.from_data(split, 5).scale)

    def test_streamed_data(self) -> None:
        whole = from_tensors(grey(), binarize="dynamic").train
        streamed = from_datasets(
            _Images(), name="s", fingerprint="1", num_workers=0, binarize="dynamic"
        ).train
        assert not streamed.fits_device
        expected = DCTPseudoinput.from_data(whole, 5).scale
        assert torch.equal(DCTPseudoinput.from_data(streamed, 5, batch_size=100).scale, expected)

    def test_a_sum_that_is_nearly_a_whole_number(self) -> None:
        # The mean's coefficient of 24 ones among 64 pixels is 3, that of its mirror image -3: in floating
        # point the sums may fall to either side, and the floor of the second may be -4.
        x = torch.zeros(400, 1, 8, 8, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        for i in range(400):
            x[i, 0].view(-1)[torch.randperm(64, generator=generator)[:24]] = 255
        scale = DCTPseudoinput.from_data(from_tensors(x).train, 1).scale
        assert scale.item() == 3.0
        # As the lowest odd frequency of a checkered row: c_1 sums to a whole number only after rounding.
        f = DCTPseudoinput.from_data(from_tensors(torch.full((3, 1, 6, 6), 255, dtype=torch.uint8)).train, 2)
        assert f.scale.flatten().tolist() == [6.0, 1.0, 1.0, 1.0]

    def test_units_of_counts(self) -> None:
        split = from_tensors(grey(), scale="count").train
        f = DCTPseudoinput.from_data(split, 9, bounds=(0.0, 255.0))
        assert f.scale.max() > 255
        torch.testing.assert_close(f.context(f(split.x)), split.x, rtol=0, atol=1.5)

    def test_refusals(self) -> None:
        data = from_tensors(grey(), grey(), binarize="dynamic")
        with pytest.raises(ValueError, match="split must be the training part, got 'valid'"):
            DCTPseudoinput.from_data(data.valid, 5)
        with pytest.raises(
            TypeError, match=r"split must be a part of a data set, such as data\.train, got Data"
        ):
            DCTPseudoinput.from_data(data, 5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="size must be at most 9"):
            DCTPseudoinput.from_data(data.train, 10)
        with pytest.raises(ValueError, match="size must be positive, got -1"):
            DCTPseudoinput.from_data(data.train, -1)
        with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
            DCTPseudoinput.from_data(data.train, 5, batch_size=0)
        with pytest.raises(ValueError, match=r"x_shape must have 3 entries, got \(2,\)"):
            DCTPseudoinput.from_data(load("two_moons").train, 1)
        counts = from_tensors(grey(), scale="count").train
        with pytest.raises(
            ValueError, match=r"split must hold x within bounds \(0\.0, 1\.0\), got 0 \.\.\. 25\d"
        ):
            DCTPseudoinput.from_data(counts, 5)

    def test_grey_without_clean_data(self) -> None:
        with pytest.raises(ValueError, match="grey=True needs a split with clean data, got a _Bare without"):
            DCTPseudoinput.from_data(_Bare(), 5, grey=True)
        assert DCTPseudoinput.from_data(_Bare(), 5).u_shape == (1, 5, 5)


class _Images(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 250

    def __getitem__(self, index: int) -> Tensor:
        return grey()[index]


class _Bare:
    """A part of a data set of one's own, without ``clean``."""

    name = "train"
    x_shape = (1, 9, 9)
    x = torch.rand(20, 1, 9, 9)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, key: slice) -> "_Bare":
        return self


@dataclass
class Facts:
    """About u on the 60,000 grey training images, for a scale that was measured on the first 50,000.

    Args:
        energy: Share of the squares of x in the coefficients that are kept.
        r_squared: Of the low-pass image as context, clipped, against the mean image.
        scales: Least and largest entry of the scale.
        variance: Of u, mean over its entries.
        clipped: Share of the coefficients of the 10,000 test images that are clipped.
    """

    energy: float
    r_squared: float
    scales: tuple[float, float]
    variance: float
    clipped: float


FACTS = {
    3: Facts(0.410, 0.030, (2, 11), 0.0216, 2.4e-4),
    5: Facts(0.557, 0.286, (2, 11), 0.0345, 2.6e-4),
    7: Facts(0.692, 0.519, (2, 11), 0.0378, 1.5e-4),
    9: Facts(0.802, 0.702, (2, 11), 0.0378, 9e-5),
    14: Facts(0.933, 0.907, (1, 11), 0.0312, 4e-5),
}


def pieces(*splits: Split) -> Iterator[Tensor]:
    """The grey images of some parts, a few at a time."""
    for split in splits:
        for start in range(0, len(split), 2500):
            yield split[start : start + 2500].clean


@pytest.fixture(scope="module")
def mnist() -> Data:
    root = real_root()
    if root is None or not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip("needs MNIST under PVAE_DATA")
    return load("mnist", root=root)


@pytest.fixture(scope="module")
def of_grey(mnist: Data) -> DCTPseudoinput:
    """Of the largest size; a smaller one's scale is a corner of its."""
    return DCTPseudoinput.from_data(mnist.train, max(FACTS), grey=True)


@pytest.fixture(scope="module")
def measured(mnist: Data, of_grey: DCTPseudoinput) -> dict[int, Facts]:
    maps = {k: DCTPseudoinput(of_grey.x_shape, k, of_grey.scale[:, :k, :k]) for k in FACTS}
    total, total_squares, n = torch.zeros(of_grey.x_shape, dtype=torch.float64), 0.0, 0
    kept, errors = dict.fromkeys(FACTS, 0.0), dict.fromkeys(FACTS, 0.0)
    moments = {k: torch.zeros(2, *f.u_shape, dtype=torch.float64) for k, f in maps.items()}
    for x in pieces(mnist.train, mnist.valid):
        n += len(x)
        total += x.sum(0, dtype=torch.float64)
        total_squares += x.square().sum(dtype=torch.float64).item()
        for k, f in maps.items():
            u = f(x)
            kept[k] += f.coefficients(x).square().sum(dtype=torch.float64).item()
            errors[k] += (x - f.context(u)).square().sum(dtype=torch.float64).item()
            moments[k] += torch.stack([u, u.square()]).sum(1, dtype=torch.float64)
    assert n == 60_000
    spread = total_squares - total.square().sum().item() / n
    return {
        k: Facts(
            energy=kept[k] / total_squares,
            r_squared=1 - errors[k] / spread,
            scales=(f.scale.min().item(), f.scale.max().item()),
            variance=(moments[k][1] / n - (moments[k][0] / n).square()).mean().item(),
            clipped=torch.stack([f.share_clipped(x) for x in pieces(mnist.test)]).mean().item(),
        )
        for k, f in maps.items()
    }


class TestMNIST:
    @pytest.mark.parametrize("size", FACTS)
    def test_facts(self, measured: dict[int, Facts], size: int) -> None:
        ours, given = measured[size], FACTS[size]
        assert ours.energy == pytest.approx(given.energy, abs=6e-4)
        assert ours.r_squared == pytest.approx(given.r_squared, abs=6e-4)
        assert ours.scales == given.scales
        assert ours.variance == pytest.approx(given.variance, abs=6e-5)
        assert ours.clipped == pytest.approx(given.clipped, abs=6e-6)

    def test_first_row(self, mnist: Data, of_grey: DCTPseudoinput) -> None:
        f = DCTPseudoinput(of_grey.x_shape, 7, of_grey.scale[:, :7, :7])
        assert f.scale[0, 0].tolist() == [11, 2, 9, 3, 5, 4, 3]
        mean = torch.stack([f(x).mean(0) for x in pieces(mnist.train, mnist.valid)]).mean(0)
        expected = [0.33, -0.13, -0.36, 0.12, 0.10, -0.03, 0.09]
        assert mean[0, 0].tolist() == pytest.approx(expected, abs=6e-3)

    def test_binary_images(self, mnist: Data, of_grey: DCTPseudoinput) -> None:
        """The default protocol: binary images spread more, and a draw that was not measured fits as well."""
        f = DCTPseudoinput.from_data(mnist.train, max(FACTS))
        larger, smaller = (f.scale > of_grey.scale).sum(), (f.scale < of_grey.scale).sum()
        assert larger > 5 * smaller
        drawn = mnist.train.sample(torch.arange(20_000)).x
        assert f.share_clipped(drawn) < 6e-5
        assert f.share_clipped(drawn) < of_grey.share_clipped(drawn)
        assert DCTPseudoinput(f.x_shape, 7, f.scale[:, :7, :7]).share_clipped(drawn) < 2e-4
