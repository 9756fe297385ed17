"""Exact match and F1 of SQuAD 2.0, at a threshold for giving no answer and at the best one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torchmetrics.functional.text import squad

from lightning_iclr.pmi_masking.squad_features import Question

KINDS = ("exact", "f1")


def score_answers(texts: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """Return exact match and F1 of an answer to each question (N, 2), each 0 or up to 1.

    A question without answers is right with an empty one, and one that is empty but for articles and punctuation.
    """
    found = np.zeros((len(texts), 2))
    for place, (text, question) in enumerate(zip(texts, questions, strict=True)):
        gold = list(question.answers) or [""]
        target: Any = {"answers": {"answer_start": [0] * len(gold), "text": gold}, "id": question.id}
        scores = squad([{"prediction_text": text, "id": question.id}], [target])
        found[place] = float(scores["exact_match"]) / 100, float(scores["f1"]) / 100
    return found


def best_threshold(odds: np.ndarray, answered: np.ndarray, unanswered: np.ndarray) -> tuple[float, float]:
    """Return the best mean score that a threshold reaches, and the least threshold that does.

    Args:
        odds: By how much the null score is above the answer's (N,); above the threshold no answer is given.
        answered: Each question's score with its answer (N,).
        unanswered: Its score without one (N,).

    Returns:
        The score, and the threshold: minus infinity where it is best to answer nothing.
    """
    order = np.argsort(odds, kind="stable")
    reached = np.concatenate([[0.0], np.cumsum((answered - unanswered)[order])]) + unanswered.sum()
    thresholds = np.concatenate([[-np.inf], odds[order]])
    last = np.append(thresholds[1:] != thresholds[:-1], True)  # equal odds are all answered or all not
    best = int(np.argmax(np.where(last, reached, -np.inf)))
    return float(reached[best]) / len(odds), float(thresholds[best])


def summarize(
    texts: Sequence[str], odds: np.ndarray, questions: Sequence[Question], threshold: float | None
) -> dict[str, float]:
    """Return the scores of answers in percent, as SQuAD's evaluation does.

    Args:
        texts: An answer to each question.
        odds: By how much the null score is above its (N,).
        questions: The questions.
        threshold: Odds above which no answer is given; ``None`` for those that are best for F1.

    Returns:
        ``exact`` and ``f1``, each also with ``_has_answer`` and ``_no_answer`` for these questions; ``best_exact`` and
        ``best_f1`` at the best thresholds for them, and those; ``threshold``; ``score`` is F1.
    """
    with_text = score_answers(texts, questions)
    none = np.asarray([not question.answers for question in questions])
    without = np.repeat(none[:, None], 2, axis=1).astype(float)
    found: dict[str, float] = {}
    for place, kind in enumerate(KINDS):
        best, at = best_threshold(odds, with_text[:, place], without[:, place])
        found |= {f"best_{kind}": 100 * best, f"best_{kind}_threshold": at}
    if threshold is None:
        threshold = found["best_f1_threshold"]
    scores = 100 * np.where((odds > threshold)[:, None], without, with_text)
    for part, own in (("", np.ones_like(none)), ("_has_answer", ~none), ("_no_answer", none)):
        if own.any():
            found |= {f"{kind}{part}": float(scores[own, place].mean()) for place, kind in enumerate(KINDS)}
    return {**found, "threshold": threshold, "score": found["f1"]}
