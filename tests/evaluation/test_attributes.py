"""Label scores against scikit-learn's and counts by hand; rare combinations by loops."""

import json
import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from torch import Tensor

from pvae.data import load
from pvae.evaluation import Combination, label_scores, rare_combinations
from pvae.evaluation.attributes import accuracy_of


class Fixed:
    """A classifier that reads its log-odds off the data."""

    def log_odds(self, x: Tensor) -> Tensor:
        return x


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def attributes(n: int = 200) -> tuple[Tensor, Tensor]:
    y = torch.from_numpy((draws().random((n, 4)) < (0.5, 0.3, 0.2, 0.7)).astype(np.float32))
    noise = torch.from_numpy(draws(1).normal(size=(n, 4)))
    return (2 * y - 1) + torch.tensor([0.5, 1.0, 1.0, 3.0]) * noise, y


def test_attributes_are_scored_as_scikit_learn_scores_them() -> None:
    log_odds, y = attributes()
    found = accuracy_of(log_odds, y)
    truth, said = y.numpy(), (log_odds > 0).float().numpy()
    plain = [accuracy_score(truth[:, j], said[:, j]) for j in range(4)]
    balanced = [balanced_accuracy_score(truth[:, j], said[:, j]) for j in range(4)]
    auc = [roc_auc_score(truth[:, j], log_odds[:, j].numpy()) for j in range(4)]
    np.testing.assert_allclose(found.per_label.numpy(), plain)
    np.testing.assert_allclose(found.balanced_per_label.numpy(), balanced)
    np.testing.assert_allclose(found.auc_per_label.numpy(), auc)
    assert found.overall == pytest.approx(np.mean(plain))
    assert found.balanced == pytest.approx(np.mean(balanced))
    assert found.auc == pytest.approx(np.mean(auc))
    assert found.exact == pytest.approx((truth == said).all(-1).mean())
    assert found.num_data == 200


def test_classes_are_scored_as_scikit_learn_scores_them() -> None:
    y = torch.from_numpy(draws().choice(4, 300, p=(0.6, 0.2, 0.15, 0.05)))
    log_odds = torch.from_numpy(draws(1).normal(size=(300, 4))) + 1.5 * torch.nn.functional.one_hot(y, 4)
    found = accuracy_of(log_odds, y)
    said = log_odds.argmax(-1).numpy()
    assert found.overall == found.exact == pytest.approx(accuracy_score(y.numpy(), said))
    assert found.balanced == pytest.approx(balanced_accuracy_score(y.numpy(), said))
    auc = [roc_auc_score(y.numpy() == k, log_odds[:, k].numpy()) for k in range(4)]
    assert found.auc == pytest.approx(np.mean(auc))


def test_labels_that_do_not_occur_are_left_out_of_means() -> None:
    found = accuracy_of(torch.eye(3), torch.tensor([0, 1, 1]))
    assert found.per_label[:2].tolist() == [1, 0.5]
    assert math.isnan(found.per_label[2])
    assert found.balanced == 0.75
    assert math.isnan(found.auc_per_label[2])
    constant = accuracy_of(torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert constant.auc == constant.balanced == constant.exact == 1
    assert math.isnan(constant.auc_per_label[0])
    json.dumps(constant.to_dict(), allow_nan=False)


def test_pairs_are_rare_by_their_count() -> None:
    y = torch.from_numpy((draws(3).random((1000, 5)) < (0.5, 0.01, 0.1, 0.9, 0.01)).astype(np.float32))
    expected = {}
    for columns in combinations(range(5), 2):
        for values in product((0, 1), repeat=2):
            count = sum(
                all(int(row[c]) == v for c, v in zip(columns, values, strict=True)) for row in y.tolist()
            )
            if count < 20:
                expected[columns, values] = count
    found = rare_combinations(y, max_rate=0.02, min_count=0)
    assert {(c.columns, c.values): c.count for c in found} == expected
    assert [c.count for c in found] == sorted(c.count for c in found)
    assert all(c.rate == c.count / 1000 == c.matches(y).double().mean() for c in found)
    assert 0 in expected.values()
    seen = rare_combinations(y, max_rate=0.02)
    assert {c.count for c in found} - {c.count for c in seen} == {0}


def test_whole_vectors_are_rare_by_their_count() -> None:
    y = torch.tensor([[1.0, 0.0, 1.0]] * 6 + [[0.0, 0.0, 1.0]] * 3 + [[1.0, 1.0, 1.0]])
    found = rare_combinations(y, max_rate=0.35, kind="vectors")
    assert [(c.values, c.count) for c in found] == [((1, 1, 1), 1), ((0, 0, 1), 3)]
    assert found[0].columns == (0, 1, 2)
    assert found[1].name(("male", "bald", "young")) == "not male, not bald, young"
    assert rare_combinations(torch.arange(10)) == ()


def test_sprites_have_the_rare_pairs_of_their_table() -> None:
    data = load("sprites")
    assert data.train.y is not None
    names = data.train.attribute_names
    found = {c.name(names): c.rate for c in rare_combinations(data.train.y)}
    assert data.truth.rate(bordered=1, dotted=1) == pytest.approx(0.00132, abs=1e-5)
    assert 0 < found["bordered, dotted"] < 0.005


def test_scores_stand_beside_ceiling_and_majority() -> None:
    log_odds, y = attributes()
    better, y_real = 2 * y + log_odds - 1, y.flip(0)
    rare = Combination((1, 2), (1, 1), 3, 0.001)
    scores = label_scores(
        Fixed(), log_odds, y, ceiling=(better.flip(0), y_real), rare=[rare], names=("a", "b", "c", "d")
    )
    assert scores.generated.overall == accuracy_of(log_odds, y).overall
    assert scores.ceiling is not None
    assert scores.ceiling.overall > scores.generated.overall > 0.7
    rates = y.double().mean(0)
    torch.testing.assert_close(scores.majority.per_label, torch.maximum(rates, 1 - rates))
    assert scores.majority.auc == scores.majority.balanced == 0.5
    (pair,) = scores.rare
    meant = (y[:, 1] == 1) & (y[:, 2] == 1)
    hit = meant & (log_odds[:, 1] > 0) & (log_odds[:, 2] > 0)
    assert pair.num_data == int(meant.sum()) > 1
    assert scores.rare_hit == pair.hit == pytest.approx(int(hit.sum()) / int(meant.sum()))
    assert pair.num_real == pair.num_data
    assert scores.rare_ceiling >= scores.rare_hit
    assert scores.rare_majority == 0
    row = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert row["rare"][0]["combination"] == "b, c"
    table = str(scores).splitlines()
    assert table[0] == "| 200 data | generated | real (ceiling) | majority |"
    assert len(table) == 2 + 5 + 4
    assert table[-1].startswith(f"| d | {100 * scores.generated.per_label[3]:.2f} % |")


def test_combinations_are_pooled_by_their_data() -> None:
    y = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    log_odds = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    pairs = [Combination((0, 1), v, 0, 0.0) for v in ((1, 1), (1, 0), (0, 0))]
    scores = label_scores(Fixed(), log_odds, y, rare=pairs)
    assert [s.num_data for s in scores.rare] == [1, 3, 0]
    assert scores.rare[0].hit == 1
    assert math.isnan(scores.rare[2].hit)
    assert scores.rare_hit == 0.5
    assert math.isnan(scores.rare_ceiling)
    assert scores.rare_majority == 0.75
    json.dumps(scores.to_dict(), allow_nan=False)


def test_classes_have_a_majority_too() -> None:
    y = torch.tensor([0, 1, 1, 1])
    scores = label_scores(Fixed(), torch.eye(4)[:, :2] + 1, y)
    assert scores.majority.overall == 0.75
    assert scores.majority.balanced == 0.5
    assert scores.ceiling is None
    assert "| accuracy | 50.00 % |  | 75.00 % |" in scores.to_markdown()


def test_a_split_brings_labels_and_names() -> None:
    data = load("sprites", num_train=50, num_test=30)

    class Truth:
        def log_odds(self, x: Tensor) -> Tensor:
            y = data.test.y
            assert y is not None
            return 2 * y - 1

    assert data.test.y is not None
    scores = label_scores(Truth(), data.test.x, data.test.y, ceiling=data.test)
    assert scores.names == data.test.attribute_names
    assert scores.ceiling is not None
    assert scores.ceiling.exact == 1


def test_bad_labels_are_named() -> None:
    with pytest.raises(ValueError, match="same number of rows, got 3 and 2"):
        label_scores(Fixed(), torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"y must lie in 0 ... 1, got 0 ... 2"):
        accuracy_of(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"y must have shape \(3, 2\), got \(3, 4\)"):
        accuracy_of(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="log_odds and y must have shapes"):
        accuracy_of(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="names must have 2 entries, got 1"):
        label_scores(Fixed(), torch.zeros(3, 2), torch.zeros(3, 2), names=("a",))
    with pytest.raises(ValueError, match="rare combinations need attributes"):
        label_scores(Fixed(), torch.zeros(3, 2), torch.arange(3) % 2, rare=[Combination((0,), (1,), 0, 0.0)])
    with pytest.raises(ValueError, match="kind must be 'pairs' or 'vectors', got 'triples'"):
        rare_combinations(torch.zeros(3, 2), kind="triples")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="y_train must have shape"):
        rare_combinations(torch.zeros(3, 2, 2))
