"""Numbers for words and n-grams that need no dictionary: 64-bit hashes, computed for a whole batch at once.

A word's hash is a polynomial in its characters, so the hashes of a word's pieces combine to it, whatever the pieces
are. Two different n-grams of a million share a hash with a chance of 3e-8.
"""

from __future__ import annotations

import numpy as np

_BASE = np.uint64(0x9E3779B97F4A7C15)
_WORD_BASE = np.uint64(0xC2B2AE3D27D4EB4F)
NO_WORD = np.uint64(0)  # in place of a word's hash: no n-gram with it is in a set
LONGEST_WORD = 4096  # characters; none that is longer matches
_POWERS = np.cumprod(np.where(np.arange(LONGEST_WORD) > 0, _BASE, np.uint64(1)))


def mix(numbers: np.ndarray) -> np.ndarray:
    """Scatter integers over all 64-bit numbers: the finaliser of splitmix64 (Steele et al., 2014)."""
    mixed = numbers.astype(np.uint64)
    mixed += _BASE
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hash_pieces(pieces: list[str]) -> np.ndarray:
    """Return the hash of each piece of a word (P,)."""
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    characters = np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    place = np.arange(len(characters)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return sum_runs(mix(characters) * _power(place), lengths)


def join_pieces(pieces: np.ndarray, lengths: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Return the hashes of words (W,) from those of their pieces.

    Args:
        pieces: Hashes of the pieces (P,), word after word.
        lengths: Their characters (P,).
        begins: Each word's first piece (W,), ascending.
    """
    before = np.cumsum(lengths) - lengths
    sizes = np.diff(begins, append=len(pieces))
    place = before - np.repeat(before[begins], sizes)
    return mix(np.add.reduceat(pieces * _power(place), begins)) if len(begins) else np.empty(0, np.uint64)


def join_words(words: list[np.ndarray]) -> np.ndarray:
    """Return the hashes of n-grams (M,) from those of their first, second, ... words, each (M,)."""
    total = words[0].copy()
    for word in words[1:]:
        total *= _WORD_BASE
        total += word
    return mix(total)


def hash_words(words: list[str]) -> np.ndarray:
    """Return the hashes of whole words (W,)."""
    return mix(hash_pieces(words))


def sum_runs(numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the sums of consecutive runs, which may be empty."""
    sums = np.zeros(len(lengths), numbers.dtype)
    full = lengths > 0
    if full.any():
        begins = np.cumsum(lengths) - lengths
        sums[full] = np.add.reduceat(numbers, begins[full])
    return sums


def _power(place: np.ndarray) -> np.ndarray:
    powers: np.ndarray = _POWERS[np.minimum(place, LONGEST_WORD - 1)]
    return powers


class HashSet:
    """A set of hashes that answers for many at once.

    Args:
        hashes: Its members (M,), in any order.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self.size = len(hashes)
        bits = max(4, (4 * self.size).bit_length())  # at most a quarter full: most lookups end at the first slot
        self._mask = np.uint64((1 << bits) - 1)
        self._slots = np.zeros(1 << bits, np.uint64)
        waiting = np.unique(hashes[hashes != 0])
        place = waiting & self._mask
        while len(waiting):
            free = self._slots[place] == 0
            self._slots[place[free]] = waiting[free]  # of several for one slot the last stays
            left = self._slots[place] != waiting
            waiting, place = waiting[left], (place[left] + np.uint64(1)) & self._mask

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Return which hashes are members, as booleans (N,)."""
        place = hashes & self._mask
        found = self._slots[place]
        hit: np.ndarray = (found == hashes) & (hashes != 0)
        asking = np.flatnonzero((found != 0) & ~hit)
        place = place[asking]
        while len(asking):  # on to the next slot, until it is the hash or empty
            place = (place + np.uint64(1)) & self._mask
            found = self._slots[place]
            equal = (found == hashes[asking]) & (found != 0)
            hit[asking[equal]] = True
            on = (found != 0) & ~equal
            asking, place = asking[on], place[on]
        return hit
