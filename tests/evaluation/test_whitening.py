"""White coordinates have the moments that they are named for."""

import torch

from pvae.evaluation import whitened


def test_a_reference_gets_the_moments_0_and_1(float64: None) -> None:
    map_ = torch.randn(3, 3)
    reference, sample = (torch.randn(4000, 3) @ map_ + 5.0 for _ in range(2))
    white, other = whitened(reference, reference, sample.float())
    assert torch.allclose(white.mean(0), torch.zeros(3), atol=1e-9)
    assert torch.allclose(torch.cov(white.T), torch.eye(3), atol=1e-9)
    assert torch.allclose(torch.cov(other.T), torch.eye(3), atol=0.1)
    assert other.dtype == torch.float64


def test_directions_that_do_not_move_stay_finite(float64: None) -> None:
    flat = torch.cat([torch.randn(50, 1), torch.ones(50, 2)], -1)
    (white,) = whitened(flat, flat)
    assert bool(white.isfinite().all())
    (apart,) = whitened(torch.randn(5, 3) * torch.tensor([1.0, 9.0, 0.0]), torch.ones(2, 3))
    assert bool(apart.isfinite().all())
    few = torch.randn(5, 3) @ torch.randn(3, 3)
    (scaled,) = whitened(few, few)
    assert torch.allclose(scaled.std(0), torch.ones(3))
    (line,) = whitened(torch.randn(50, 1), torch.zeros(4, 1))
    assert line.shape == (4, 1)
