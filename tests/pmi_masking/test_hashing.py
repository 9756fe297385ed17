"""Hashes of words and n-grams: the same whatever a word is cut into, and apart otherwise."""

import random
from itertools import pairwise

import numpy as np
import pytest

from lightning_iclr.pmi_masking.hashing import HashSet, hash_pieces, hash_words, join_pieces, join_words, mix, sum_runs

MASK = (1 << 64) - 1
WORDS = ["a", "ab", "ba", "the", "café", "中", "\U0001f600s", "x" * 300, "naïve", "''"]


def mix_by_hand(number):
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


def word_by_hand(word):
    total = sum(mix_by_hand(ord(letter)) * pow(0x9E3779B97F4A7C15, place, 1 << 64) for place, letter in enumerate(word))
    return mix_by_hand(total & MASK)


def test_mixing_is_splitmix64():
    # The first outputs of the published generator from the seed 0.
    assert mix(np.array([0])).tolist() == [0xE220A8397B1DCDAF]
    assert mix(np.array([0x9E3779B97F4A7C15], np.uint64)).tolist() == [0x6E789E6AA1B965F4]
    assert mix(np.array([-1])).tolist() == [mix_by_hand(MASK)]


def test_a_words_hash_is_the_polynomial_of_its_letters():
    assert hash_words(WORDS).tolist() == [word_by_hand(word) for word in WORDS]


def test_a_words_hash_does_not_depend_on_how_it_is_cut():
    chance = random.Random(0)
    for _ in range(200):
        words = [chance.choice(WORDS) for _ in range(chance.randint(1, 6))]
        pieces, begins = [], []
        for word in words:
            begins.append(len(pieces))
            bounds = sorted({0, len(word), *(chance.randint(0, len(word)) for _ in range(chance.randint(0, 3)))})
            pieces += [word[begin:end] for begin, end in pairwise(bounds)]
        lengths = np.array([len(piece) for piece in pieces])
        joined = join_pieces(hash_pieces(pieces), lengths, np.array(begins))
        np.testing.assert_array_equal(joined, hash_words(words))


def test_an_empty_piece_changes_nothing():
    joined = join_pieces(hash_pieces(["", "th", "", "e", ""]), np.array([0, 2, 0, 1, 0]), np.array([0]))
    np.testing.assert_array_equal(joined, hash_words(["the"]))


def test_different_words_and_ngrams_have_different_hashes():
    letters = "abcdefghij"
    words = [a + b + c + d for a in letters for b in letters for c in letters for d in letters]
    hashes = hash_words(words)
    assert len(np.unique(hashes)) == len(words)
    first, second = np.divmod(np.arange(300 * 300), 300)
    pairs = join_words([hashes[first], hashes[second]])  # a b and b a are two
    triples = join_words([hashes[first], hashes[second], hashes[first]])
    assert len(np.unique(np.concatenate([hashes, pairs, triples]))) == len(words) + 2 * 300 * 300


def test_words_that_differ_in_a_late_letter_have_different_hashes():
    words = [f"{'x' * length}{letter}" for length in range(100) for letter in "abc"]
    assert len(np.unique(hash_words(words))) == 300


def test_ngrams_do_not_hang_together_by_their_letters():
    whole, parts = hash_words(["ab", "c"]), hash_words(["a", "bc"])
    assert join_words([whole[:1], whole[1:]]) != join_words([parts[:1], parts[1:]])


def test_joining_words_leaves_their_hashes_alone():
    words = hash_words(WORDS)
    before = words.copy()
    join_words([words, words])
    np.testing.assert_array_equal(words, before)


def test_sums_of_runs_may_be_empty():
    assert sum_runs(np.array([1, 2, 4, 8]), np.array([0, 2, 0, 1, 1, 0])).tolist() == [0, 3, 0, 4, 8, 0]
    assert sum_runs(np.array([], np.uint64), np.array([0, 0])).tolist() == [0, 0]


def test_nothing_has_no_hash():
    assert len(hash_words([])) == len(join_pieces(hash_pieces([]), np.array([], int), np.array([], int))) == 0


@pytest.mark.parametrize("size", [0, 1, 5, 1000])
def test_a_set_of_hashes_answers_as_pythons(size):
    rng = np.random.default_rng(size)
    members = rng.integers(0, 2**64, size, dtype=np.uint64)
    asked = np.concatenate([members, rng.integers(0, 2**64, 5000, dtype=np.uint64), np.array([0], np.uint64)])
    rng.shuffle(asked)
    found = HashSet(members).contains(asked)
    assert found.tolist() == [number in set(members.tolist()) for number in asked.tolist()]
    assert found.sum() == size


def test_a_set_of_hashes_that_want_one_slot_answers_as_pythons():
    members = (np.arange(1, 200, 2) << 40).astype(np.uint64)  # all with the same low bits
    members = np.concatenate([members, members, np.arange(30, dtype=np.uint64)])
    asked = np.concatenate([(np.arange(400) << 40).astype(np.uint64), np.arange(60, dtype=np.uint64)])
    expected = [number in set(members.tolist()) - {0} for number in asked.tolist()]  # 0 stands for an empty slot
    assert HashSet(members).contains(asked).tolist() == expected
