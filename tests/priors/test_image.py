"""The prior of images over one of vectors."""

import pytest
import torch

from pvae.priors import GaussianMixture, ImagePrior, StandardNormal


def test_density_and_draws_are_those_of_the_vectors() -> None:
    torch.manual_seed(0)
    mixture = GaussianMixture(12, 3)
    u = torch.randn(5, 3, 2, 2)
    p = ImagePrior(mixture, (3, 2, 2))()
    assert p.event_shape == (3, 2, 2)
    torch.testing.assert_close(p.log_prob(u), mixture().log_prob(u.flatten(1)))
    torch.manual_seed(1)
    drawn = p.expand([4]).sample()
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, mixture().expand([4]).sample().reshape(4, 3, 2, 2))


def test_gradients_reach_the_prior() -> None:
    prior = ImagePrior(GaussianMixture(4, 2), (1, 2, 2))
    prior().log_prob(torch.randn(3, 1, 2, 2)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in prior.parameters())


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have the 4 entries of \(1, 2, 2\), got 5"):
        ImagePrior(StandardNormal(5), (1, 2, 2))
