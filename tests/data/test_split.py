"""Batches: what they hold, in which order they come, and what is drawn once and what anew."""

import itertools
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pvae.data import Batch, Data, Split, from_tensors

N, SHAPE = 300, (1, 4, 5)


def grey(n: int = N) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def three(**options: Any) -> Data:
    x = grey(3 * N)
    y = torch.arange(3 * N) % 10
    labels = {"train": y[:N], "valid": y[N : 2 * N], "test": y[2 * N :]}
    return from_tensors(x[:N], x[N : 2 * N], x[2 * N :], y=labels, **options)


def order(split: Split, **options: Any) -> list[int]:
    arguments: dict[str, Any] = {"seed": 0, "epoch": 0, "drop_last": False, **options}
    return [int(i) for batch in split.batches(64, **arguments) for i in batch.index]


class TestBatch:
    def test_fields(self) -> None:
        split = three().train
        batch = split.sample(torch.tensor([7, 3, 7]))
        assert isinstance(batch, Batch)
        x, y, index = batch
        assert (x.shape, x.dtype) == ((3, *SHAPE), torch.float32)
        assert y is not None
        assert (y.tolist(), y.dtype) == ([7, 3, 7], torch.int64)
        assert (index.tolist(), index.dtype) == ([7, 3, 7], torch.int64)
        assert torch.equal(x, grey(3 * N)[[7, 3, 7]].to(torch.float32) / 255)

    def test_without_labels(self) -> None:
        assert from_tensors(grey()).train.sample(torch.tensor([0])).y is None

    def test_attributes(self) -> None:
        y = torch.rand(N, 3).round()
        data = from_tensors(grey(), y=y, attribute_names=["a", "b", "c"])
        assert torch.equal(torch.as_tensor(data.train.sample(torch.tensor([4])).y), y[[4]])
        assert (data.attribute_names, data.train.attribute_names) == (("a", "b", "c"),) * 2
        assert data.num_classes is None

    def test_count_scale(self) -> None:
        data = three(scale="count")
        assert torch.equal(data.test.x, grey(3 * N)[2 * N :].to(torch.float32))
        assert (data.protocol.values, data.protocol.levels) == ("count", 256)

    def test_threshold_is_at_one_half(self) -> None:
        data = from_tensors(torch.arange(256, dtype=torch.uint8).reshape(1, 256), binarize="threshold")
        assert data.train.x[0].tolist() == [0.0] * 128 + [1.0] * 128
        assert torch.equal(data.train.sample(torch.tensor([0])).x, data.train.x)


class TestDynamic:
    def test_training_batches_are_bernoulli_with_the_grey_value(self) -> None:
        data = from_tensors(grey(2), binarize="dynamic")
        draws = torch.stack([data.train.sample(torch.tensor([0])).x[0] for _ in range(4000)])
        assert set(draws.unique().tolist()) == {0.0, 1.0}
        p = (grey(2)[0].to(torch.float64) / 255).flatten()
        counts = draws.sum(0).flatten().tolist()
        pvalues = [stats.binomtest(int(k), 4000, float(q)).pvalue for k, q in zip(counts, p, strict=True)]
        assert min(pvalues) > 1e-5
        # Pixels are drawn apart from one another: the variance of their sum is the sum of their variances.
        total = draws.flatten(1).sum(1).var()
        assert float(total) == pytest.approx(float((p * (1 - p)).sum()), rel=0.15)

    def test_black_and_white_stay(self) -> None:
        x = torch.tensor([[0, 255]], dtype=torch.uint8).expand(2000, 2).contiguous()
        data = from_tensors(x, binarize="dynamic")
        drawn = data.train.sample(torch.arange(2000)).x
        for values in (drawn, data.train.x):
            assert torch.equal(values, torch.tensor([0.0, 1.0]).expand(2000, 2))

    def test_draws_come_from_the_global_generator(self) -> None:
        split = three(binarize="dynamic").train
        index = torch.arange(64)
        torch.manual_seed(3)
        first, second = split.sample(index).x, split.sample(index).x
        torch.manual_seed(3)
        assert torch.equal(split.sample(index).x, first)
        assert not torch.equal(first, second)

    def test_validation_and_test_are_drawn_once(self) -> None:
        data = three(binarize="dynamic")
        for split in (data.valid, data.test):
            state = torch.get_rng_state()
            first, second = (split.sample(torch.arange(64)).x for _ in range(2))
            assert torch.equal(first, second)
            assert torch.equal(first, split.x[:64])
            assert torch.equal(torch.get_rng_state(), state)

    def test_evaluated_draws_follow_the_grey_values(self) -> None:
        x = torch.arange(256, dtype=torch.uint8).expand(2000, 256).contiguous()
        split = from_tensors(x[:1], test=x, binarize="dynamic").test
        z = (split.x.double().mean(0) - x[0] / 255)[1:-1]
        z = z / ((x[0] / 255) * (1 - x[0] / 255) / 2000).sqrt()[1:-1].double()
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3

    def test_parts_and_seeds_have_noise_of_their_own(self) -> None:
        x = torch.full((N, *SHAPE), 128, dtype=torch.uint8)
        data, other = (from_tensors(x, x, x, binarize="dynamic", seed=seed) for seed in (0, 1))
        draws = [data.train.x, data.valid.x, data.test.x, other.test.x]
        for a, b in itertools.combinations(draws, 2):
            assert 0.4 < float((a != b).to(torch.float64).mean()) < 0.6
        again = from_tensors(x, x, x, binarize="dynamic")
        assert torch.equal(again.test.x, data.test.x)

    def test_static_training_data_stay(self) -> None:
        static, dynamic = three(binarize="static"), three(binarize="dynamic")
        index = torch.arange(N)
        assert torch.equal(static.train.sample(index).x, static.train.sample(index).x)
        assert torch.equal(static.train.x, dynamic.train.x)
        assert torch.equal(static.test.x, dynamic.test.x)


class TestDequantize:
    def test_unit_levels_become_intervals(self) -> None:
        data = three(dequantize=True)
        assert (data.protocol.values, data.protocol.levels) == ("unit", None)
        for x in (data.train.sample(torch.arange(N)).x, data.train.x):
            noise = x.double() * 256 - grey(3 * N)[:N]
            assert float(noise.min()) >= 0.0
            assert float(noise.max()) <= 1.0
            assert stats.kstest(noise.flatten().numpy(), "uniform").pvalue > 1e-3
        fresh = [data.train.sample(torch.arange(9)).x for _ in range(2)]
        assert not torch.equal(*fresh)
        assert torch.equal(data.test.sample(torch.arange(9)).x, data.test.x[:9])

    def test_counts_keep_their_unit(self) -> None:
        data = three(dequantize=True, scale="count")
        assert data.protocol.values == "real"
        assert torch.equal(data.test.x.floor().to(torch.uint8), grey(3 * N)[2 * N :])


class TestOrder:
    def test_is_a_permutation_of_seed_and_epoch(self) -> None:
        split = three().train
        first = order(split)
        assert sorted(first) == list(range(N))
        assert first != sorted(first)
        torch.manual_seed(99)
        assert order(three().train) == first
        assert order(split, epoch=1) != first
        assert order(split, seed=1) != first

    def test_leaves_the_global_generator_alone(self) -> None:
        split = three().train
        state = torch.get_rng_state()
        order(split)
        assert torch.equal(torch.get_rng_state(), state)

    def test_unshuffled(self) -> None:
        assert order(three().valid, shuffle=False) == list(range(N))

    @pytest.mark.parametrize("drop_last", [False, True])
    def test_resumes_anywhere(self, drop_last: bool) -> None:
        split = three().train
        whole = order(split, drop_last=drop_last)
        assert len(whole) == (N // 64 * 64 if drop_last else N)
        for start in range(split.num_batches(64, drop_last=drop_last) + 1):
            assert order(split, drop_last=drop_last, start=start) == whole[64 * start :]

    def test_batch_sizes(self) -> None:
        split = three().train
        sizes = [len(b.x) for b in split.batches(64, seed=0, epoch=0, drop_last=False)]
        assert sizes == [64, 64, 64, 64, 44]
        assert split.num_batches(64, drop_last=False) == 5

    def test_refusals(self) -> None:
        split = three().train
        with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
            split.batches(0, seed=0, epoch=0, drop_last=True)
        with pytest.raises(ValueError, match=r"batch_size must be at most 300.*got 301"):
            split.batches(301, seed=0, epoch=0, drop_last=True)
        with pytest.raises(ValueError, match=r"start must lie in 0 \.\.\. 5, the number of batches, got 6"):
            split.batches(64, seed=0, epoch=0, drop_last=False, start=6)


class TestSubset:
    keys = (
        slice(0, 100),
        slice(10, 290, 7),
        torch.tensor([5, 2, 299, 2]),
        torch.tensor([-1, 0]),
        torch.arange(N) % 3 == 0,
    )

    @pytest.mark.parametrize("key", keys)
    @pytest.mark.parametrize("binarize", ["dynamic", "static", "threshold", None])
    def test_is_encoded_as_in_the_whole(self, key: slice | Tensor, binarize: str | None) -> None:
        whole, fresh = three(binarize=binarize).test, three(binarize=binarize).test
        expected = whole.x[key]
        assert whole.y is not None
        for part in (whole[key], fresh[key]):
            assert torch.equal(part.x, expected)
            assert part.y is not None
            assert torch.equal(part.y, whole.y[key])
            assert torch.equal(part.positions, torch.arange(N)[key])
            assert torch.equal(part.sample(torch.arange(2)).x, expected[:2])
            assert part.name == "test"

    def test_of_a_subset(self) -> None:
        whole = three(binarize="dynamic").test
        part = whole[100:200][torch.tensor([0, 50])]
        assert part.positions.tolist() == [100, 150]
        assert torch.equal(part.x, whole.x[[100, 150]])

    def test_training_part_is_still_redrawn(self) -> None:
        part = three(binarize="dynamic").train[:50]
        index = torch.arange(50)
        assert not torch.equal(part.sample(index).x, part.sample(index).x)

    def test_protocol_says_so(self) -> None:
        whole = three().test
        assert whole[:100].protocol.subset == "0:100"
        assert "custom/test[0:100]" in str(whole[:100])
        picked = whole[torch.tensor([5, 2])].protocol
        assert picked.subset is not None
        assert picked.subset.startswith("2 positions ")
        hashes = {
            p.hash
            for p in (
                whole.protocol,
                whole[:100].protocol,
                whole[:99].protocol,
                whole[1:100].protocol,
                picked,
            )
        }
        assert len(hashes) == 5
        # The same data have the same name, however they were reached.
        assert whole[torch.arange(100)].protocol == whole[:100].protocol == whole[:200][:100].protocol
        assert whole[:].protocol == whole.protocol

    def test_index_is_the_position_in_the_subset(self) -> None:
        part = three().test[100:110]
        batch = next(part.batches(4, seed=0, epoch=0, drop_last=True, shuffle=False))
        assert batch.index.tolist() == [0, 1, 2, 3]
        assert torch.equal(batch.x, part.x[:4])

    def test_refusals(self) -> None:
        split = three().test
        with pytest.raises(ValueError, match=r"positions must lie in 0 \.\.\. 299, got 0 \.\.\. 300"):
            split[torch.tensor([0, 300])]
        with pytest.raises(ValueError, match=r"mask of this split must have shape \(300,\), got \(3,\)"):
            split[torch.tensor([True, False, True])]
        with pytest.raises(ValueError, match="at least one datum of 300, got none"):
            split[5:5]
        with pytest.raises(TypeError, match=r"indexed by a slice, positions.*got int"):
            split[3]  # type: ignore[index]
        with pytest.raises(TypeError, match=r"got torch.float32 of shape \(2,\)"):
            split[torch.zeros(2)]


class Recorder(TorchDispatchMode):
    """Collects the names of all operators, on every device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


class TestDevice:
    @pytest.mark.parametrize(
        "options", [{"binarize": "dynamic"}, {"dequantize": True}, {}, {"binarize": "static"}]
    )
    def test_a_batch_reads_nothing_back(self, options: dict[str, Any]) -> None:
        split = three(**options).train
        index = torch.arange(64)
        split.sample(index)
        with Recorder() as recorder:
            split.sample(index)
        waits = {
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::equal",
            "aten::_unique2",
            "aten::is_nonzero",
        }
        assert recorder.names
        assert not recorder.names & waits

    @pytest.mark.parametrize("options", [{"binarize": "dynamic"}, {"dequantize": True}, {}])
    def test_everything_happens_on_the_device(self, options: dict[str, Any]) -> None:
        # The meta device refuses tensors of another device, as an accelerator does, and needs no hardware.
        split = three(**options).train.to("meta")
        batches = list(split.batches(64, seed=0, epoch=0, drop_last=False))
        assert [len(batch.x) for batch in batches] == [64, 64, 64, 64, 44]
        for batch in batches:
            assert batch.y is not None
            assert {batch.x.device.type, batch.y.device.type, batch.index.device.type} == {"meta"}
        assert split.device.type == "meta"

    def test_what_was_drawn_moves_along(self) -> None:
        split = three(binarize="dynamic").test
        drawn = split.x
        moved = split.to("meta")
        assert (moved.x.device.type, moved.x.shape) == ("meta", drawn.shape)
        assert moved.sample(torch.arange(3)).x.device.type == "meta"
        assert split.x is drawn

    def test_data_move_whole(self) -> None:
        data = three().to("meta")
        assert {data.train.device.type, data.valid.device.type, data.test.device.type} == {"meta"}
        assert data.protocol == three().protocol

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_gpu_sees_the_same_data_and_never_waits(self) -> None:
        here, there = three(binarize="dynamic"), three(binarize="dynamic").to("cuda")
        assert torch.equal(there.test.x.cpu(), here.test.x)
        index = torch.arange(64, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            x = there.train.sample(index).x
            there.test.sample(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert set(x.unique().tolist()) == {0.0, 1.0}


def test_repr_and_names() -> None:
    data = three(binarize="dynamic", name="mine", class_names=[str(i) for i in range(10)])
    assert repr(data).startswith("Data(mine: binarized (dynamic), seed 0; train 300 / valid 300 / test 300")
    assert repr(data.test).startswith("Split(mine/test: ")
    assert (data.name, data.x_shape, data.num_classes) == ("mine", SHAPE, 10)
    assert data.test.class_names == data.class_names == tuple("0123456789")
    assert [split.name for split in (data.train, data.valid, data.test)] == list(data.parts)
    assert data.train.fits_device


@pytest.mark.parametrize(
    ("options", "top"),
    [
        ({"binarize": "dynamic"}, 255),
        ({"binarize": "static"}, 255),
        ({"dequantize": True}, 256),
        ({}, 255),
        ({"scale": "count"}, 1),
        ({"scale": "count", "dequantize": True}, 1),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_clean_is_the_mean_of_the_noise(options: dict[str, Any], top: int, part: str) -> None:
    split: Split = getattr(three(**options), part)
    levels = grey(3 * N)[slice(0, N) if part == "train" else slice(2 * N, 3 * N)].double()
    wanted = (levels + (0.5 if options.get("dequantize") else 0.0)) / top
    torch.testing.assert_close(split.clean.double(), wanted, rtol=1e-6, atol=1e-7)
    assert (split.clean.dtype, split[5:9].clean.shape) == (torch.float32, (4, *SHAPE))
    # The noise leaves it where it is: over all pixels the mean differs by its own standard error at most.
    error = 0.5 / split.x.numel() ** 0.5 * (1 if options.get("binarize") else 1 / top)
    if options.get("binarize") or options.get("dequantize"):
        assert abs(float((split.x.double() - split.clean.double()).mean())) < 4 * error
