"""Scores of n-grams against sums over all segmentations, and the properties that the paper builds on."""

from functools import cache
from math import log

import numpy as np
import pytest
from gensim.models.phrases import Phrases

from lightning_iclr.pmi_masking.ngrams import count_ngrams
from lightning_iclr.pmi_masking.scores import frequency_score, log_probability, naive_pmi_score, pmi_score
from lightning_iclr.pmi_masking.words import WordIds, WordSplitter
from tests.pmi_masking.toys import SlowScores, count_by_hand, paragraphs, segmentations, zipf_documents


@cache
def corpus(seed):
    documents = zipf_documents(seed, 8_000)
    return count_ngrams(documents, min_count=4), SlowScores(count_by_hand(documents, max_n=5))


def test_there_are_two_to_the_n_minus_one_segmentations_less_one():
    assert [len(list(segmentations(tuple(range(n))))) for n in (2, 3, 4, 5)] == [1, 3, 7, 15]


@pytest.mark.parametrize("weight", [1.0, 2.0])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pmi_and_naive_pmi_equal_brute_force(seed, n, weight):
    table, slow = corpus(seed)
    words = [tuple(row) for row in table.ngrams(n).tolist()]
    assert len(words) > 10
    pmi = [slow.pmi(each, weight) for each in words]
    naive = [slow.naive_pmi(each, weight) for each in words]
    np.testing.assert_allclose(pmi_score(table, n, weight), pmi, rtol=0, atol=1e-10)
    np.testing.assert_allclose(naive_pmi_score(table, n, weight), naive, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_frequency_is_the_count(n):
    table, slow = corpus(0)
    assert frequency_score(table, n).tolist() == [slow.counts[n - 1][tuple(row)] for row in table.ngrams(n).tolist()]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_probabilities_are_shares_of_all_positions_of_a_length(n):
    table, slow = corpus(0)
    share = [slow.counts[n - 1][tuple(row)] / slow.totals[n - 1] for row in table.ngrams(n).tolist()]
    np.testing.assert_allclose(np.exp(log_probability(table, n)), share, rtol=1e-12)


def test_pmi_of_pairs_is_the_formula_of_collocations():
    # As in gensim's Phrases or Church and Hanks: log of c(ab) N^2 / (M c(a) c(b)), N words and M pairs.
    documents = [np.array([0, 1, 2, 0, 1, 3, 0, 2])] * 2
    table = count_ngrams(documents, max_n=2, min_count=2)
    formula = {(0, 1): log(4 * 16**2 / (14 * 6 * 4)), (3, 0): log(2 * 16**2 / (14 * 2 * 6))}
    scores = dict(zip(map(tuple, table.ngrams(2).tolist()), pmi_score(table, 2).tolist(), strict=True))
    assert {words: scores[words] for words in formula} == pytest.approx(formula, abs=1e-12)


def test_counts_and_pmi_of_pairs_are_those_of_gensims_phrases():
    sentences = [WordSplitter().split(text) for text in paragraphs()[:1500]]
    ids = WordIds(WordSplitter(), punctuation="keep")
    table = count_ngrams([ids.encode(" ".join(sentence)) for sentence in sentences], max_n=2)
    words, pairs = np.array(ids.words, dtype=object), table.ngrams(2)
    theirs = Phrases(sentences, min_count=11, threshold=-1, scoring="npmi", delimiter=" ")
    scores = theirs.export_phrases()
    found = {" ".join(words[pair]): place for place, pair in enumerate(pairs)}
    assert len(found) > 300
    assert found.keys() == scores.keys()
    # Theirs is PMI over -log p(ab), and p(ab) the share of all words; ours is that of all pairs.
    total, ours = table.totals[0], pmi_score(table, 2)
    for phrase, place in found.items():
        share = log(table.counts[1][place] / total)
        pmi = ours[place] + log(table.totals[1] / total)
        assert theirs.vocab[phrase] == table.counts[1][place]
        assert pmi / -share == pytest.approx(scores[phrase], abs=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_pmi_is_never_above_naive_pmi(n, seed):
    table, _ = corpus(seed)
    difference = naive_pmi_score(table, n) - pmi_score(table, n)
    assert difference.min() > -1e-10
    assert (difference.max() < 1e-10) == (n == 2)  # of pairs there is one segmentation


def test_pmi_of_independent_words_is_near_zero():
    ids = np.random.default_rng(0).choice(4, 200_000, p=[0.4, 0.3, 0.2, 0.1])
    table = count_ngrams([ids], max_n=2)
    assert len(table.counts[1]) == 16
    assert (np.abs(pmi_score(table, 2)) < 3 / np.sqrt(table.counts[1])).all()  # of log count the deviation is 1/sqrt


def test_the_weakest_link_demotes_a_trigram_that_naive_pmi_ranks_higher():
    # 2 3 occurs as a pair only, and 5, which is everywhere, stands before it, too: "the new york". The words
    # of 7 8 9 occur alone as well, and are yet an expression: "time and again".
    rng = np.random.default_rng(0)
    pieces = [rng.integers(10, 16, rng.integers(3, 8)) for _ in range(3000)]
    pieces += [np.array([5, 2, 3])] * 12 + [np.array([2, 3])] * 28 + [np.array([5])] * 2500
    pieces += [np.array([7, 8, 9])] * 60 + [np.array([word]) for word in (7, 8, 9)] * 300
    table = count_ngrams([np.concatenate([pieces[place] for place in rng.permutation(len(pieces))])], max_n=3)
    words = [tuple(row) for row in table.ngrams(3).tolist()]
    weak, strong = words.index((5, 2, 3)), words.index((7, 8, 9))
    naive, pmi = naive_pmi_score(table, 3), pmi_score(table, 3)
    assert naive[weak] > naive[strong] > 5
    assert pmi[strong] > 3
    assert pmi[weak] < pmi[strong] / 2  # 5 before "2 3" is little more than chance
    assert pmi[weak] == pytest.approx(
        log(table.counts[2][weak] / table.totals[2])
        - log_probability(table, 1)[table.words.tolist().index(5)]
        - log_probability(table, 2)[table.ngrams(2).tolist().index([2, 3])]
    )


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("score", [pmi_score, naive_pmi_score, frequency_score])
def test_lengths_without_a_score_are_refused(score, n):
    with pytest.raises(ValueError, match=f"n must lie between 2 and 5, got {n}"):
        score(corpus(0)[0], n)
