"""Code statistics against two passes of NumPy and SciPy, whatever the batches and their order."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy import stats as scipy_stats
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pvae.data import from_datasets, from_tensors
from pvae.nn import MLPEncoder
from pvae.priors import CodeStats, collect_codes


def codes(n: int = 500, z_dim: int = 4, seed: int = 0) -> Tensor:
    """Correlated codes, skewed and of different scales and locations."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(z_dim, z_dim))
    raw = rng.gamma(2.0, size=(n, z_dim)) @ mix * np.logspace(-1, 1, z_dim)
    return torch.from_numpy(raw + 10 * np.arange(z_dim))


def gathered(batches: Any, covariance: Any = "full", **options: Any) -> CodeStats:
    batches = list(batches)
    stats = CodeStats(batches[0].shape[1], covariance, **options)
    for batch in batches:
        stats.update(batch)
    return stats


def assert_two_pass(stats: CodeStats, a: Tensor, rtol: float = 1e-9) -> None:
    x = a.double().numpy()
    mean = x.sum(0) / len(x)
    centred = x - mean
    covariance = centred.T @ centred / (len(x) - 1)
    assert stats.n == len(x)
    np.testing.assert_allclose(stats.mean.numpy(), mean, rtol=rtol)
    np.testing.assert_allclose(stats.var.numpy(), covariance.diagonal(), rtol=rtol)
    np.testing.assert_allclose(stats.std.numpy(), covariance.diagonal() ** 0.5, rtol=rtol)
    np.testing.assert_allclose(stats.min.numpy(), x.min(0))
    np.testing.assert_allclose(stats.max.numpy(), x.max(0))
    kurtosis = scipy_stats.kurtosis(x, axis=0)
    np.testing.assert_allclose(stats.kurtosis.numpy(), kurtosis, rtol=1e-6, atol=1e-8)
    if stats.covariance == "full":
        scale = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
        np.testing.assert_allclose(stats.cov.numpy() / scale, covariance / scale, rtol=0, atol=rtol)


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 500, 1000])
def test_any_batches_give_what_two_passes_give(batch_size: int, covariance: str) -> None:
    a = codes()
    assert_two_pass(gathered(a.split(batch_size), covariance), a)


def test_merging_is_associative_and_blind_to_order() -> None:
    parts = [codes(n, seed=n) for n in (3, 1, 200, 17)]
    a, b, c, d = (gathered([part]) for part in parts)
    whole = torch.cat(parts)
    for merged in (
        a.merge(b).merge(c).merge(d),
        a.merge(b.merge(c.merge(d))),
        d.merge(c).merge(a.merge(b)),
        CodeStats(4, "full").merge(c).merge(a).merge(CodeStats(4, "full")).merge(d).merge(b),
    ):
        assert_two_pass(merged, whole)
        assert torch.equal(merged.codes, a.merge(b).merge(c).merge(d).codes)
    assert a.n == 3  # merging changes neither


def test_large_means_keep_their_variance_where_the_textbook_formula_loses_it() -> None:
    noise = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = torch.tensor([1e6, 1e3, 1e4], dtype=torch.float64)
    a = (noise + ratio).float()
    exact = a.double().var(0)
    naive = (a.square().mean(0) - a.mean(0).square()).double()
    assert ((naive / exact - 1).abs() > 0.01).all()
    stats = gathered(a.split(128), "diag")
    torch.testing.assert_close(stats.var, exact, rtol=1e-9, atol=0)
    assert stats.var.dtype == torch.float64
    # The same in double precision, where the codes are exact and their known variance is the oracle.
    wide = noise.square() + 1e6
    torch.testing.assert_close(gathered(wide.split(999), "full").var, (wide - 1e6).var(0), rtol=1e-9, atol=0)


def test_the_codes_kept_depend_on_neither_order_nor_shards() -> None:
    a, index = codes(2000), torch.arange(2000)
    kept = CodeStats(4, max_codes=100)
    kept.update(a, index)
    assert kept.codes.shape == (100, 4)
    shuffle = torch.randperm(2000)
    shards = []
    for rows in (shuffle[:700], shuffle[700:1900], shuffle[1900:]):
        shard = CodeStats(4, max_codes=100)
        for part in rows.split(33):
            shard.update(a[part], index[part])
        shards.append(shard)
    assert torch.equal(shards[2].merge(shards[0]).merge(shards[1]).codes, kept.codes)
    # A smaller subset is the first part of a larger one, and fewer codes than there is room for all stay.
    fewer = CodeStats(4, max_codes=30)
    fewer.update(a, index)
    assert torch.equal(fewer.codes, kept.codes[:30])
    everything = CodeStats(4, max_codes=5000)
    everything.update(a, index)
    assert torch.equal(everything.codes.sort(0).values, a.sort(0).values)


def test_the_codes_kept_are_a_fair_sample() -> None:
    index = torch.arange(100_000)
    stats = CodeStats(1, max_codes=10_000)
    stats.update(index.double().unsqueeze(1), index)
    counts = np.histogram(stats.codes.numpy(), bins=20, range=(0, 100_000))[0]
    # Sampling without replacement spreads counts a little less than the chi-square says.
    assert scipy_stats.chisquare(counts).pvalue > 1e-3
    parity = int((stats.codes % 2).sum())
    assert abs(parity - 5000) < 4 * 50
    ranks = scipy_stats.spearmanr(stats.codes[:, 0].numpy(), np.arange(10_000)).statistic
    assert abs(ranks) < 4 / 100


def test_without_an_index_the_codes_themselves_decide() -> None:
    a = codes(300)
    forwards, backwards = CodeStats(4, max_codes=50), CodeStats(4, max_codes=50)
    forwards.update(a)
    for part in a.flip(0).split(11):
        backwards.update(part)
    assert torch.equal(forwards.codes, backwards.codes)
    assert (forwards.codes[:, None] == a).all(-1).any(1).all()


def test_robust_scale_withstands_outliers() -> None:
    a = torch.randn(4001, 3, dtype=torch.float64) * torch.tensor([0.5, 1.0, 2.0]) + 3
    a[:200] = 1e3
    stats = gathered([a], max_codes=5000)
    plain, robust = stats.scale(), stats.scale(robust=True)
    assert (plain.scale > 100).all()
    assert (stats.kurtosis > 10).all()
    torch.testing.assert_close(robust.scale, torch.tensor([0.5, 1.0, 2.0]).double(), rtol=0.15, atol=0)
    x = a.numpy()
    np.testing.assert_allclose(robust.loc.numpy(), np.median(x, 0))
    mad = scipy_stats.median_abs_deviation(x, axis=0)
    np.testing.assert_allclose(robust.scale.numpy(), 1.4826 * mad)
    even = gathered([a[:1000]])
    np.testing.assert_allclose(even.scale(robust=True).loc.numpy(), np.median(x[:1000], 0))


def test_dimensions_that_hardly_vary_are_lifted_and_named_once() -> None:
    a = torch.randn(100, 5, dtype=torch.float64)
    a[:, 1] = 7.0
    a[:, 3] *= 1e-3
    stats = gathered([a])
    with pytest.warns(UserWarning, match=r"2 of 5 code dimensions hardly vary; .* 1 \(0\), 3 \(0\.00"):
        base = stats.scale()
    assert base.dead.tolist() == [False, True, False, True, False]
    floor = 0.01 * stats.std.median().item()
    assert base.floor == pytest.approx(floor)
    assert base.scale[base.dead].tolist() == [pytest.approx(floor)] * 2
    assert torch.equal(base.scale[~base.dead], stats.std[~base.dead])
    assert stats.kurtosis.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats.scale()
    low = CodeStats(1, floor_abs=0.5)
    low.update(torch.tensor([[0.0], [0.1]]))
    with pytest.warns(UserWarning, match="lifted to 0.5"):
        assert low.scale().scale.item() == 0.5


def test_factor_is_the_shrunk_covariance() -> None:
    stats = gathered([codes()])
    factor = stats.factor()
    r, covariance = factor.shrinkage, stats.cov
    wanted = (1 - r) * covariance + r * torch.diag(covariance.diagonal())
    wanted = wanted + factor.jitter * torch.diag(covariance.diagonal())
    torch.testing.assert_close(factor.scale_tril @ factor.scale_tril.mT, wanted, rtol=1e-12, atol=1e-12)
    assert (r, factor.jitter) == (1e-3, 1e-6)
    assert factor.condition == pytest.approx(np.linalg.cond(wanted.numpy()), rel=1e-6)


def test_factor_of_a_singular_covariance_and_of_dead_dimensions() -> None:
    a = torch.randn(50, 2, dtype=torch.float64)
    singular = torch.cat([a, a, 1e3 * a], 1)
    factor = gathered([singular]).factor(shrinkage=0.0)
    assert factor.scale_tril.isfinite().all()
    assert (factor.scale_tril.diagonal() > 0).all()
    assert factor.condition > 1e6
    dead = torch.cat([a, torch.zeros(50, 1)], 1)
    stats = gathered([dead])
    with pytest.warns(UserWarning, match=r"1 of 3 .* 2 \(0\)"):
        tril = stats.factor().scale_tril
    covariance = tril @ tril.mT
    assert covariance[2, :2].abs().max() == 0
    assert covariance[2, 2].sqrt().item() == pytest.approx(stats.scale().floor, rel=1e-5)


def test_robust_factor_has_robust_variances() -> None:
    a = codes(2000)
    stats = gathered([a])
    tril = stats.factor(robust=True).scale_tril
    variances = (tril @ tril.mT).diagonal()
    torch.testing.assert_close(variances.sqrt(), stats.scale(robust=True).scale, rtol=1e-5, atol=0)


def test_held_out_codes_that_differ_are_reported() -> None:
    train = gathered([torch.randn(5000, 3, dtype=torch.float64)])
    same = gathered([torch.randn(5000, 3, dtype=torch.float64)])
    assert train.compare(same).largest < 0.2
    moved = torch.randn(5000, 3, dtype=torch.float64)
    moved[:, 1] = moved[:, 1] * 2 + 0.3
    with pytest.warns(UserWarning, match=r"by 0\.\d+ > 0.2 in dimension 1 .*overfitted"):
        shift = train.compare(gathered([moved]))
    assert shift.mean_gap[1].item() == pytest.approx(0.3, abs=0.1)
    assert shift.log_std_ratio[1].item() == pytest.approx(math.log(2), abs=0.05)
    assert shift.largest == shift.log_std_ratio[1]


def test_a_run_folder_can_keep_them() -> None:
    a = codes(300)
    stats = gathered(a[:200].split(30), max_codes=50, floor_abs=1e-3)
    again = CodeStats.from_tensors(load(save(stats.to_tensors())))
    for name in ("mean", "var", "cov", "min", "max", "kurtosis", "codes"):
        assert torch.equal(getattr(again, name), getattr(stats, name)), name
    assert (again.n, again.max_codes, again.floor_abs) == (200, 50, 1e-3)
    again.update(a[200:])
    assert again.n == 300
    assert stats.n == 200
    tensors = stats.to_tensors()
    del tensors["m2"]
    with pytest.raises(ValueError, match="'m2' is missing"):
        CodeStats.from_tensors(tensors)
    assert "n=200" in repr(stats)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3), r"codes must have shape \(B, 2\), got \(3,\)"),
        (torch.zeros(3, 4), r"codes must have shape \(B, 2\), got \(3, 4\)"),
        (torch.tensor([[0.0, 1.0], [math.nan, 1.0], [0.0, math.inf]]), "in 2 of 3 codes, .* of datum 1"),
    ],
)
def test_bad_codes_are_refused_and_leave_nothing(bad: Tensor, message: str) -> None:
    stats = gathered([torch.randn(5, 2)])
    with pytest.raises(ValueError, match=message):
        stats.update(bad)
    assert stats.n == 5
    assert stats.mean.isfinite().all()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="z_dim and max_codes must be positive, got 0"):
        CodeStats(0)
    with pytest.raises(ValueError, match="covariance must be 'diag' or 'full', got 'tied'"):
        CodeStats(2, "tied")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floor_abs and floor_rel must be positive"):
        CodeStats(2, floor_abs=0.0)
    with pytest.raises(ValueError, match="need at least 2 codes, got 1"):
        _ = gathered([torch.zeros(1, 2)]).var
    stats = gathered([torch.randn(5, 2)], "diag")
    with pytest.raises(ValueError, match="cov needs statistics gathered with covariance='full'"):
        _ = stats.cov
    with pytest.raises(ValueError, match=r"index must be int64 of shape \(5,\)"):
        stats.update(torch.zeros(5, 2), torch.arange(4))
    with pytest.raises(ValueError, match="other must have the same z_dim"):
        stats.merge(CodeStats(3))
    with pytest.raises(ValueError, match="other must have z_dim 2, got 3"):
        stats.compare(CodeStats(3))
    with pytest.raises(ValueError, match=r"shrinkage must lie in \[0, 1\], got 2"):
        gathered([torch.randn(5, 2)]).factor(shrinkage=2.0)
    stats.update(torch.zeros(0, 2))
    assert stats.n == 5


class Restless(nn.Module):
    """An encoder that gives other codes in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm1d(8).eval()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(self.net(x)))


def test_codes_are_collected_in_evaluation_mode_and_twice_alike() -> None:
    data = from_tensors(torch.rand(150, 1, 4, 4), binarize="dynamic")
    encoder = Restless()
    encoder(data.train.x)  # moves the running averages
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    generator = torch.get_rng_state()
    first = collect_codes(encoder, data.train, batch_size=64)
    again = collect_codes(encoder, data.train, batch_size=64)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.to_tensors().values(), again.to_tensors().values(), strict=True)
    )
    assert encoder.net.training
    assert encoder.head.training
    assert not encoder.frozen.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    # They are the codes of the data as evaluated, not of a batch drawn anew.
    with torch.no_grad():
        wanted = encoder.eval()(data.train.x).double()
    torch.testing.assert_close(first.mean, wanted.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first.cov, wanted.mT.cov(), rtol=1e-5, atol=1e-8)


def test_modes_come_back_after_a_failure() -> None:
    encoder = Restless()
    data = from_tensors(torch.rand(10, 1, 4, 4))
    with torch.no_grad():
        encoder.head.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="codes must be finite, got nan or inf in 10 of 10 codes"):
        collect_codes(encoder, data.train)
    assert encoder.training
    with pytest.raises(ValueError, match="batch_size must be positive"):
        collect_codes(encoder, data.train, 0)


def test_shards_of_a_split_merge_to_the_whole() -> None:
    data = from_tensors(torch.rand(90, 1, 4, 4))
    encoder = MLPEncoder((1, 4, 4), 2, hidden=(8,))
    whole = collect_codes(encoder, data.train, 17, max_codes=20)
    parts = [
        collect_codes(encoder, data.train[rows], 40, max_codes=20) for rows in (slice(50, 90), slice(50))
    ]
    merged = parts[0].merge(parts[1])
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-6, atol=1e-8)
    # The subset is chosen by position in the whole part.
    torch.testing.assert_close(merged.codes, whole.codes, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        loc = encoder(data.train.x)[0]
    torch.testing.assert_close(whole.mean.float(), loc.mean(0), rtol=1e-5, atol=1e-6)


def test_streamed_data_give_the_same_codes() -> None:
    x = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    encoder = MLPEncoder((1, 4, 4), 2, hidden=(8,))
    stored = from_tensors(x)
    streamed = from_datasets(TensorDataset(x, torch.arange(40)), name="s", fingerprint="1", num_workers=0)
    wanted, got = (collect_codes(encoder, data.train, 16) for data in (stored, streamed))
    torch.testing.assert_close(got.cov, wanted.cov, rtol=1e-6, atol=1e-9)
    assert torch.equal(got.codes, wanted.codes)
    noisy = from_datasets(
        TensorDataset(x, torch.arange(40)), name="s", fingerprint="1", num_workers=0, binarize="dynamic"
    )
    generator = torch.get_rng_state()
    assert torch.equal(collect_codes(encoder, noisy.train).codes, collect_codes(encoder, noisy.train).codes)
    assert torch.equal(torch.get_rng_state(), generator)
