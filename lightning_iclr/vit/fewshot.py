"""Few-shot accuracy of frozen features by regularised least squares, which has a closed form (section 4.1)."""

from typing import Self

import torch
from torch import Tensor


class FewShotLeastSquares:
    """Map features to classes by ridge regression to targets in {-1, 1}, as the official evaluator does.

    Features are standardised by the support set's mean and population deviation + 1e-5 and get one more, constant
    feature for the bias, which is regularised like the others. With fewer images than features the equivalent dual
    form is solved.

    Args:
        l2: Weight of the squared norm of the coefficients.
        bias: Value of the constant feature.

    Raises:
        ValueError: A number is not positive.

    Examples:
        >>> features = torch.tensor([[0.0, 1.0], [0.1, 0.9], [1.0, 0.0], [0.9, 0.2]])
        >>> FewShotLeastSquares(l2=1.0).fit(features, torch.tensor([0, 0, 1, 1])).predict(features)
        tensor([0, 0, 1, 1])
    """

    def __init__(self, l2: float = 2.0**10, bias: float = 100.0) -> None:
        if not l2 > 0:
            raise ValueError(f"l2 must be positive, got {l2}")
        if not bias > 0:
            raise ValueError(f"bias must be positive, got {bias}")
        self.l2, self.bias = l2, bias

    def fit(self, features: Tensor, labels: Tensor, num_classes: int | None = None) -> Self:
        """Solve for the coefficients, in float64.

        Args:
            features: Support features (N, D).
            labels: Their classes (N,).
            num_classes: Classes K; ``None`` counts up to the largest label.

        Raises:
            ValueError: Features and labels do not fit together, or a class has no image; the error names it.
        """
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise ValueError(
                "features must be (N, D) and labels (N,), with N at least 1; "
                f"got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        classes = int(labels.max()) + 1 if num_classes is None else num_classes
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ValueError(
                f"labels must be between 0 and {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
        empty = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"labels must hold every class, and there is no image of class {', '.join(map(str, empty))}"
            )
        features = features.double()
        self.mean = features.mean(dim=0)
        self.std = features.std(dim=0, correction=0) + 1e-5
        x = self._augment(features)
        y = 2.0 * torch.nn.functional.one_hot(labels, classes).to(x) - 1.0
        if len(x) >= x.shape[1]:
            self.coefficients = torch.linalg.solve(x.T @ x + self.l2 * _eye(x.shape[1], x), x.T @ y)
        else:
            self.coefficients = x.T @ torch.linalg.solve(x @ x.T + self.l2 * _eye(len(x), x), y)
        return self

    def scores(self, features: Tensor) -> Tensor:
        """Map features (N, D) to regression scores (N, K).

        Raises:
            RuntimeError: `fit` was not called.
        """
        if not hasattr(self, "coefficients"):
            raise RuntimeError("call fit before predict")
        scores: Tensor = self._augment(features.double()) @ self.coefficients
        return scores

    def predict(self, features: Tensor) -> Tensor:
        """Map features (N, D) to classes (N,)."""
        return self.scores(features).argmax(dim=1)

    def _augment(self, features: Tensor) -> Tensor:
        standardised = (features - self.mean) / self.std
        return torch.cat([standardised, standardised.new_full((len(features), 1), self.bias)], dim=1)


def few_shot_rows(labels: Tensor, shots: int, num_classes: int, seed: int) -> Tensor:
    """Draw ``shots`` rows of each class, so that fewer shots with the same seed are a subset.

    Args:
        labels: Classes (N,).
        shots: Rows to draw of each.
        num_classes: Classes K.
        seed: Seed of the draw.

    Returns:
        Rows (K, shots).

    Raises:
        ValueError: A class has fewer rows; the error names it.

    Examples:
        >>> few_shot_rows(torch.tensor([0, 1, 0, 1]), shots=2, num_classes=2, seed=0).sort().values
        tensor([[0, 2],
                [1, 3]])
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = []
    for label in range(num_classes):
        own = order[labels[order] == label][:shots]
        if len(own) < shots:
            raise ValueError(f"shots={shots} takes more images of class {label} than there are, {len(own)}")
        drawn.append(own)
    return torch.stack(drawn)


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
