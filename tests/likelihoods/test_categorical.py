"""Categorical likelihood: the layout of the logits, and refusals."""

import numpy as np
import pytest
import torch
from scipy import special

from pvae.likelihoods import Categorical


def test_log_prob_equals_scipy() -> None:
    logits = torch.randn(2, 4 * 3, 2, 2, dtype=torch.float64)
    x = torch.randint(4, (2, 3, 2, 2)).double()
    # (datum, level, channel, row, column): the level runs slowest.
    table = special.log_softmax(logits.numpy().reshape(2, 4, 3, 2, 2), axis=1)
    expected = np.take_along_axis(table, x.long().numpy()[:, None], axis=1).sum((1, 2, 3, 4))
    np.testing.assert_allclose(Categorical(4)(logits).log_prob(x).numpy(), expected, atol=1e-12)


def test_masses_of_all_tables_sum_to_one() -> None:
    logits = torch.randn(1, 3 * 2, dtype=torch.float64)
    x = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).double()
    assert Categorical(3)(logits).log_prob(x).logsumexp(0).item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("value", [-1.0, 5.0, 0.5])
def test_other_values_are_refused(value: float) -> None:
    Categorical(5).check(torch.arange(5.0).reshape(1, 5))
    with pytest.raises(
        ValueError, match=rf"needs x in {{0, \.\.\., 4}}, got values such as {value:.3g}: .*scale='count'"
    ):
        Categorical(5).check(torch.tensor([[0.0, value]]))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        Categorical(1)
    with pytest.raises(
        ValueError, match=r"params must hold 5 numbers for each entry of x .* got shape \(2, 11\)"
    ):
        Categorical(5)(torch.zeros(2, 11))
