"""Kernel distances against loops, and against the moments that a cubic kernel compares."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pvae.evaluation import kernel_distance


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_mean_over_pairs_written_out() -> None:
    a, b = normal(7, 3), 0.3 + normal(5, 3, seed=1)

    def kernel(s: Tensor, t: Tensor) -> float:
        return float((sum(u * v for u, v in zip(s.tolist(), t.tolist(), strict=True)) / 3 + 1) ** 3)

    within = [
        np.mean([kernel(s, t) for i, s in enumerate(z) for j, t in enumerate(z) if i != j]) for z in (a, b)
    ]
    across = np.mean([kernel(s, t) for s in a for t in b])
    assert kernel_distance(a, b).value == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_it_estimates_the_difference_of_moments_without_bias() -> None:
    # (s t + 1)^3 in one dimension: 3 (m1 - n1)^2 + 3 (m2 - n2)^2 + (m3 - n3)^2 for raw moments m and n.
    loc, scale = 0.4, 1.3
    first, second, third = loc, loc**2 + scale**2, loc**3 + 3 * loc * scale**2
    exact = 3 * first**2 + 3 * (second - 1) ** 2 + third**2
    found = kernel_distance(loc + scale * normal(8000, 1), normal(8000, 1, seed=1))
    assert abs(found.value - exact) < 4 * found.standard_error < 0.6 * exact
    # Tiny samples have no bias either.
    many = [
        kernel_distance(loc + scale * normal(6, 1, seed=2 * i), normal(8, 1, seed=2 * i + 1)).value
        for i in range(2000)
    ]
    assert abs(np.mean(many) - exact) < 4 * np.std(many) / math.sqrt(len(many)) < 0.5 * exact


@pytest.mark.parametrize("gap", [0.0, 0.7])
def test_the_error_is_that_of_new_samples_or_more(gap: float) -> None:
    found = [
        kernel_distance(gap + normal(300, 4, seed=2 * i), normal(300, 4, seed=2 * i + 1)) for i in range(80)
    ]
    spread = np.std([f.value for f in found])
    claimed = np.sqrt(np.mean([f.standard_error**2 for f in found]))
    assert 0.85 * spread < claimed < (5 if gap == 0 else 1.4) * spread


def test_one_distribution_is_at_zero_and_one_set_too() -> None:
    a, b = normal(2000, 16), normal(2000, 16, seed=1)
    found = kernel_distance(a, b)
    assert abs(found.value) < 3 * found.standard_error
    # The same set twice: below zero, by what a row's pairs with itself are left out of.
    assert -0.1 < kernel_distance(a, a).value < 0


def test_small_samples_have_fewer_parts_or_no_error() -> None:
    assert kernel_distance(normal(8, 2), normal(90, 2)).num_parts == 4
    found = kernel_distance(normal(3, 2), normal(90, 2))
    assert math.isnan(found.standard_error)
    assert math.isfinite(found.value)
    assert "±" in str(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(torch.zeros(1, 2), torch.zeros(3, 2)), "a must have shape"),
        (lambda: kernel_distance(torch.zeros(4, 2), torch.zeros(4, 3)), "the same width, got 2 and 3"),
        (
            lambda: kernel_distance(torch.zeros(4, 2), torch.zeros(4, 2), num_parts=1),
            "num_parts must be at least 2",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
