"""The tasks of GLUE: their columns, classes and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score, multiclass_accuracy, multiclass_matthews_corrcoef


class Task(NamedTuple):
    """A task of GLUE.

    Attributes:
        columns: Columns of the one text or two.
        num_classes: Classes; 1 for numbers.
        score: Which of its scores the task is judged by.
        measure: Its scores, by name, of predictions (N, K) and labels (N,).
        val_split: The part that it is validated on.
    """

    columns: tuple[str, ...]
    num_classes: int
    score: str
    measure: Callable[[Tensor, Tensor], dict[str, float]]
    val_split: str = "validation"


def accuracy(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracy in percent."""
    classes = probabilities.shape[1]
    return {"accuracy": 100 * float(multiclass_accuracy(probabilities, labels.long(), classes, average="micro"))}


def f1_and_accuracy(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, and F1 of the second of two classes, in percent."""
    f1 = binary_f1_score(probabilities.argmax(dim=1), labels.long())
    return {**accuracy(probabilities, labels), "f1": 100 * float(f1)}


def matthews(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Return Matthews' correlation, times 100, and the accuracy."""
    correlation = multiclass_matthews_corrcoef(probabilities, labels.long(), probabilities.shape[1])
    return {**accuracy(probabilities, labels), "matthews": 100 * float(correlation)}


def correlations(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """Return Pearson's and Spearman's correlations, times 100."""
    numbers = predictions[:, 0]
    return {
        "pearson": 100 * float(pearson_corrcoef(numbers, labels)),
        "spearman": 100 * float(spearman_corrcoef(numbers, labels)),
    }


_MATCHED = "validation_matched+validation_mismatched"
TASKS = {
    "cola": Task(("sentence",), 2, "matthews", matthews),
    "sst2": Task(("sentence",), 2, "accuracy", accuracy),
    "mrpc": Task(("sentence1", "sentence2"), 2, "f1", f1_and_accuracy),
    "stsb": Task(("sentence1", "sentence2"), 1, "spearman", correlations),
    "qqp": Task(("question1", "question2"), 2, "f1", f1_and_accuracy),
    "mnli": Task(("premise", "hypothesis"), 3, "accuracy", accuracy, _MATCHED),
    "qnli": Task(("question", "sentence"), 2, "accuracy", accuracy),
    "rte": Task(("sentence1", "sentence2"), 2, "accuracy", accuracy),
    "wnli": Task(("sentence1", "sentence2"), 2, "accuracy", accuracy),
}


def find_task(name: str) -> Task:
    """Return a task by its name on the hub.

    Raises:
        ValueError: There is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]
