import collections
import random
import re
import string

import numpy as np
import pytest

from lightning_iclr.pmi_masking.squad_features import Question
from lightning_iclr.pmi_masking.squad_scores import best_threshold, score_answers, summarize

WORDS = ["the", "a", "Rome", "rome,", "new", "York", "york's", "1982", "-", "of"]


def normalized(text):
    """SQuAD's rule: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def official(text, golds):
    """SQuAD 2.0's rule: the best exact match and F1 over the right answers, [""] where there are none."""
    golds = [gold for gold in golds if normalized(gold)] or [""]
    exact, f1 = 0.0, 0.0
    for gold in golds:
        ours, theirs = normalized(text).split(), normalized(gold).split()
        exact = max(exact, float(ours == theirs))
        shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
        if not ours or not theirs:
            f1 = max(f1, float(ours == theirs))
        elif shared:
            precision, recall = shared / len(ours), shared / len(theirs)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
    return exact, f1


def some_questions(number):
    generator = random.Random(0)
    texts, questions = [], []
    for place in range(number):
        golds = tuple(" ".join(generator.choices(WORDS[2:], k=generator.randint(1, 3))) for _ in range(place % 3))
        questions.append(Question(str(place), "?", "", tuple(g for g in golds if normalized(g)), -1))
        texts.append(" ".join(generator.choices(WORDS, k=generator.randint(0, 3))))
    return texts, questions


def test_answers_are_scored_by_the_official_rules():
    texts, questions = some_questions(300)
    expected = [official(text, question.answers) for text, question in zip(texts, questions, strict=True)]
    np.testing.assert_allclose(score_answers(texts, questions), expected, atol=1e-6)
    assert {exact for exact, _ in expected} == {0.0, 1.0}


def test_the_best_threshold_is_that_of_a_search_over_all():
    generator = np.random.default_rng(0)
    for _ in range(50):
        size = int(generator.integers(1, 12))
        odds = generator.integers(-3, 4, size).astype(float)  # some are equal
        answered, unanswered = generator.random(size), generator.integers(0, 2, size).astype(float)
        candidates = [-np.inf, *sorted(set(odds))]
        means = [np.where(odds > at, unanswered, answered).mean() for at in candidates]
        best, at = best_threshold(odds, answered, unanswered)
        assert best == pytest.approx(max(means))
        assert np.where(odds > at, unanswered, answered).mean() == pytest.approx(best)


def test_the_summary_is_the_official_evaluation_at_a_threshold():
    texts, questions = some_questions(60)
    odds = np.random.default_rng(1).normal(size=60)
    found = summarize(texts, odds, questions, threshold=0.3)
    given = ["" if odd > 0.3 else text for text, odd in zip(texts, odds, strict=True)]
    scores = np.asarray([official(text, question.answers) for text, question in zip(given, questions, strict=True)])
    none = np.asarray([not question.answers for question in questions])
    for name, own in (("", none | True), ("_has_answer", ~none), ("_no_answer", none)):
        assert found[f"exact{name}"] == pytest.approx(100 * scores[own, 0].mean())
        assert found[f"f1{name}"] == pytest.approx(100 * scores[own, 1].mean(), abs=1e-4)
    chosen = summarize(texts, odds, questions, threshold=None)
    assert chosen["f1"] == pytest.approx(found["best_f1"]) == chosen["score"]
    assert chosen["threshold"] == found["best_f1_threshold"]
    assert found["best_f1"] >= found["f1"]


def test_parts_without_questions_are_left_out():
    found = summarize(["x"], np.zeros(1), [Question("q", "?", "", (), -1)], 0.0)
    assert "f1_no_answer" in found
    assert "f1_has_answer" not in found
