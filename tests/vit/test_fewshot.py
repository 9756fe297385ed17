import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from lightning_iclr.vit.fewshot import FewShotLeastSquares, few_shot_rows


def data(n, d=6, classes=4):
    labels = torch.arange(n) % classes
    return torch.randn(n, d, dtype=torch.float64) * 3 + labels[:, None] + 5, labels


def ridge(features, labels, queries, classes=4):
    mean, std = features.mean(0), features.std(0) + 1e-5  # numpy's population deviation

    def augment(x):
        return np.hstack([(x - mean) / std, np.full((len(x), 1), 100.0)])

    targets = np.where(np.arange(classes) == labels[:, None], 1.0, -1.0)
    model = Ridge(alpha=1024, fit_intercept=False, solver="svd").fit(augment(features), targets)
    return model.predict(augment(queries)), model.coef_.T


@pytest.mark.parametrize("n", [200, 8, 4], ids=["primal", "primal-few", "dual"])
def test_few_shot_least_squares_equals_scikit_learn_s_ridge(n):
    features, labels = data(n)
    queries, _ = data(30)
    solver = FewShotLeastSquares().fit(features, labels)
    scores, coefficients = ridge(features.numpy(), labels.numpy(), queries.numpy())
    torch.testing.assert_close(solver.coefficients, torch.from_numpy(coefficients), rtol=0, atol=1e-8)
    torch.testing.assert_close(solver.scores(queries), torch.from_numpy(scores), rtol=0, atol=1e-8)
    assert torch.equal(solver.predict(queries), torch.from_numpy(scores.argmax(axis=1)))


def test_the_dual_form_equals_the_primal_one():
    features, labels = data(12, d=40)
    dual = FewShotLeastSquares(l2=3.0).fit(features, labels)
    x = torch.cat(
        [(features - features.mean(0)) / (features.std(0, correction=0) + 1e-5), torch.full((12, 1), 100.0)], 1
    )
    y = 2.0 * (labels[:, None] == torch.arange(4)) - 1.0
    primal = torch.linalg.inv(x.T @ x + 3.0 * torch.eye(41, dtype=torch.float64)) @ x.T @ y.double()
    torch.testing.assert_close(dual.coefficients, primal, rtol=0, atol=1e-8)


def test_a_class_without_images_is_named():
    with pytest.raises(ValueError, match="no image of class 1, 3"):
        FewShotLeastSquares().fit(torch.randn(4, 3), torch.tensor([0, 2, 4, 0]))
    with pytest.raises(ValueError, match="no image of class 2"):
        FewShotLeastSquares().fit(torch.randn(2, 3), torch.tensor([0, 1]), num_classes=3)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(3, dtype=torch.long), r"got \(4, 3\) and \(3,\)"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long), r"got \(4,\) and \(4,\)"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), r"got \(0, 3\) and \(0,\)"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "labels must be between 0 and 0, got -1 to 0"),
    ],
)
def test_features_and_labels_that_do_not_fit_are_refused(features, labels, message):
    with pytest.raises(ValueError, match=message):
        FewShotLeastSquares().fit(features, labels)


def test_a_label_outside_the_classes_is_refused():
    with pytest.raises(ValueError, match="labels must be between 0 and 1, got 0 to 2"):
        FewShotLeastSquares().fit(torch.zeros(3, 2), torch.tensor([0, 1, 2]), num_classes=2)


def test_the_numbers_must_be_positive():
    with pytest.raises(ValueError, match="l2 must be positive, got 0"):
        FewShotLeastSquares(l2=0)
    with pytest.raises(ValueError, match="bias must be positive, got -1"):
        FewShotLeastSquares(bias=-1)


def test_prediction_needs_a_fit():
    with pytest.raises(RuntimeError, match="call fit"):
        FewShotLeastSquares().predict(torch.zeros(1, 2))


def test_few_shot_rows_are_distinct_and_of_their_class():
    labels = torch.randint(5, (300,))
    rows = few_shot_rows(labels, shots=20, num_classes=5, seed=3)
    assert rows.shape == (5, 20)
    assert torch.equal(labels[rows], torch.arange(5)[:, None].expand(5, 20))
    assert len(set(rows.flatten().tolist())) == 100


def test_fewer_shots_are_a_subset_and_other_seeds_another_draw():
    labels = torch.arange(300) % 5
    rows = few_shot_rows(labels, shots=20, num_classes=5, seed=3)
    assert torch.equal(few_shot_rows(labels, shots=4, num_classes=5, seed=3), rows[:, :4])
    assert not torch.equal(few_shot_rows(labels, shots=20, num_classes=5, seed=4), rows)


def test_every_row_of_a_class_is_drawn_equally_often():
    labels, draws = torch.arange(40) % 2, 2000
    counts = torch.zeros(40)
    for seed in range(draws):
        counts[few_shot_rows(labels, shots=5, num_classes=2, seed=seed).flatten()] += 1
    expected, sigma = draws / 4, (draws * 0.25 * 0.75) ** 0.5
    assert (counts - expected).abs().max() < 5 * sigma  # the largest of 40


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ValueError, match="shots=3 takes more images of class 1 than there are, 2"):
        few_shot_rows(torch.tensor([0, 0, 0, 1, 1]), shots=3, num_classes=2, seed=0)
