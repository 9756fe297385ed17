"""Surface words: what a vocabulary counts in texts, and what a batch of any tokenizer's tokens spells.

A text is normalised and split as BERT does it: lower case, accents off, every punctuation mark and every Chinese
character a word of its own. A tokenizer's tokens are brought to the same words by three tables over its vocabulary, so
that masks do not depend on how it cuts words, and no text is decoded on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from lightning_iclr._imports import optional_import
from lightning_iclr.pmi_masking.hashing import NO_WORD, hash_pieces, hash_words, join_pieces
from lightning_iclr.pmi_masking.spelling import cuts_unknown, special_ids, token_speller, unknown_id

Punctuation = Literal["break", "keep"]
Deduplicate = Literal["paragraph", "document"]
_SLOW = 1 << 16  # spellings that a table of words remembers


@dataclass(frozen=True)
class WordSplitter:
    """Normalise a text and split it into words, as BERT's tokenizer does before it looks for pieces.

    Args:
        lowercase: Whether case is dropped.
        strip_accents: Whether accents are dropped.

    Examples:
        >>> WordSplitter().split("São Paulo's café.")
        ['sao', 'paulo', "'", 's', 'cafe', '.']
    """

    lowercase: bool = True
    strip_accents: bool = True
    _normalizer: Any = field(init=False, repr=False, compare=False)
    _splitter: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        optional_import("tokenizers", "text")
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer

        normalizer = BertNormalizer(lowercase=self.lowercase, strip_accents=self.strip_accents)
        object.__setattr__(self, "_normalizer", normalizer)
        object.__setattr__(self, "_splitter", BertPreTokenizer())

    def normalize(self, text: str) -> str:
        """Return the normalised text, whose words are divided by white space or punctuation."""
        normalized: str = self._normalizer.normalize_str(text)
        return normalized

    def split(self, text: str) -> list[str]:
        """Return the words of a text."""
        return [word for word, _ in self._splitter.pre_tokenize_str(self.normalize(text))]


def is_punctuation(word: str) -> bool:
    """Return whether a word is a punctuation mark, as BERT defines it: Unicode's, and all ASCII symbols."""
    return len(word) == 1 and _splits(word)


@cache
def _splits(character: str) -> bool:
    from tokenizers.pre_tokenizers import BertPreTokenizer  # whose Unicode may be older than Python's

    return len(BertPreTokenizer().pre_tokenize_str(f"a{character}b")) == 3


class WordIds:
    """Give the words of texts numbers, in the order in which they first occur.

    Args:
        splitter: Splits texts.
        punctuation: Whether a punctuation mark breaks a text, or is a word.
        deduplicate: Whether a paragraph (line), or a document, that has occurred before is left out.

    Examples:
        >>> ids = WordIds(WordSplitter())
        >>> ids.encode("To be, or not to be").tolist(), ids.words
        ([0, 1, -1, 2, 3, 0, 1], ['to', 'be', 'or', 'not'])
    """

    def __init__(
        self, splitter: WordSplitter, punctuation: Punctuation = "break", deduplicate: Deduplicate | None = None
    ) -> None:
        if punctuation not in ("break", "keep"):
            raise ValueError(f"punctuation must be 'break' or 'keep', got {punctuation!r}")
        if deduplicate not in ("paragraph", "document", None):
            raise ValueError(f"deduplicate must be 'paragraph', 'document' or None, got {deduplicate!r}")
        self.splitter, self.punctuation, self.deduplicate = splitter, punctuation, deduplicate
        self.words: list[str] = []
        self.repeated = 0  # paragraphs or documents that were left out
        self._seen: set[int] = set()
        self._numbers: dict[str, int] = {}

    def encode(self, text: str) -> np.ndarray:
        """Return the numbers of a text's words (T,), -1 where n-grams may not go on."""
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings, got {type(text).__name__}")
        if self.deduplicate == "document":
            return np.empty(0, np.int32) if self._repeats(text) else self._encode(text)
        if self.deduplicate is None:
            return self._encode(text)
        gap = np.array([-1], np.int32)
        parts = [gap if self._repeats(line) else self._encode(line) for line in text.split("\n") if line.strip()]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the numbers of each text."""
        return map(self.encode, texts)

    def _encode(self, text: str) -> np.ndarray:
        numbers = self._numbers
        ids = []
        for word in self.splitter.split(text):
            number = numbers.get(word)
            if number is None:
                number = self._new(word)
            ids.append(number)
        return np.array(ids, dtype=np.int32)

    def _new(self, word: str) -> int:
        number = -1
        if self.punctuation == "keep" or not is_punctuation(word):
            number = len(self.words)
            self.words.append(word)
        self._numbers[word] = number
        return number

    def _repeats(self, text: str) -> bool:
        key = hash(" ".join(text.split()))
        if key in self._seen:
            self.repeated += 1
            return True
        self._seen.add(key)
        return False


class TokenWords:
    """What each token of a tokenizer spells, as parts of words.

    Args:
        tokenizer: Of ``transformers``: WordPiece, byte-level BPE, SentencePiece or any other whose continued words are
            marked by ``##``, or whose first pieces are marked by a space.
        splitter: Normalises and splits.
    """

    def __init__(self, tokenizer: Any, splitter: WordSplitter) -> None:
        size = len(tokenizer)
        special = set(special_ids(tokenizer))
        spelling = token_speller(tokenizer)
        self._unknown = unknown_id(tokenizer) if cuts_unknown(tokenizer) else None
        self.special = np.zeros(size, bool)
        self.special[sorted(special)] = True
        self._begins = np.ones(size, bool)  # whether a word begins with the token's first character
        self._ends = np.zeros(size, bool)  # whether a word ends with its last
        self._broken = np.zeros(size, bool)  # whether it holds a part of a character, or nothing that is seen
        counts = np.zeros(size, np.int64)
        parts: list[str] = []
        self._bytes: dict[int, bytes] = {}
        self._splitter = splitter
        self._slow: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(size)))):
            if number in special or token is None:
                continue
            text, continues = spelling(token)
            if isinstance(text, bytes) or not splitter.normalize(text):  # such as an accent of its own
                self._broken[number] = True
                self._bytes[number] = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
                self._begins[number], counts[number] = not continues, 1
                parts.append("")
                continue
            normal = splitter.normalize(text)
            words = splitter.split(text)
            self._begins[number] = not continues or normal[:1].isspace() or (bool(words) and is_punctuation(words[0]))
            self._ends[number] = not words or normal[-1:].isspace() or is_punctuation(words[-1])
            counts[number] = len(words)
            parts += words
            self._bytes[number] = text.encode(errors="surrogatepass")
        self._first = np.cumsum(counts) - counts
        self._counts = counts
        self._hashes = hash_pieces(parts)
        self._lengths = np.array([len(part) for part in parts], dtype=np.int64)

    def read(self, tokens: np.ndarray, usable: np.ndarray, documents: np.ndarray | None = None) -> Words:
        """Return the words that rows of tokens spell.

        Args:
            tokens: Token ids (B, L).
            usable: Which are text (B, L), and not special or padding.
            documents: Number of the document of each token (B, L), where rows hold several without a special token
                between.
        """
        flat = tokens[usable]
        place = np.flatnonzero(usable)  # of each usable token among all
        adjacent = np.diff(place, prepend=-2) == 1
        adjacent[place % tokens.shape[1] == 0] = False
        if documents is not None:
            adjacent &= np.diff(documents[usable], prepend=-1) == 0
        after_word = np.concatenate([[False], ~self._ends[flat[:-1]]]) if len(flat) else np.zeros(0, bool)
        goes_on = adjacent & ~self._begins[flat] & after_word
        blank = self._counts[flat] == 0  # a space of its own belongs to the word that follows
        attached = adjacent & np.concatenate([[False], blank[:-1]]) & ~self._begins[flat] if len(flat) else goes_on
        unit_begins = ~(goes_on | attached)

        sizes = self._counts[flat]
        token = np.repeat(np.arange(len(flat)), sizes)  # of each part
        first_of_token = np.diff(token, prepend=-1) != 0
        offset = np.arange(len(token)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        part = self._first[flat][token] + offset
        word_begins = np.flatnonzero(~(first_of_token & goes_on[token]))
        hashes = join_pieces(self._hashes[part], self._lengths[part], word_begins)
        first = token[word_begins]
        last = token[np.append(word_begins[1:], len(token)) - 1] if len(token) else first
        if self._broken.any() and self._broken[flat].any():
            hashes, first, last = self._spell_out(flat, unit_begins, hashes, first, last)
        if self._unknown is not None and len(first):
            self._forget(tokens, documents, place, hashes, first, last)
        return Words(place, unit_begins, adjacent, hashes, first, last)

    def _forget(
        self,
        tokens: np.ndarray,
        documents: np.ndarray | None,
        place: np.ndarray,
        hashes: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
    ) -> None:
        """Give words of which an unknown token holds a part the hash of no word."""
        unknown = tokens == self._unknown
        if not unknown.any():
            return
        before, after = np.zeros_like(unknown), np.zeros_like(unknown)
        before[:, 1:], after[:, :-1] = unknown[:, :-1], unknown[:, 1:]
        if documents is not None:
            same = documents[:, 1:] == documents[:, :-1]
            before[:, 1:] &= same
            after[:, :-1] &= same
        flat = tokens.reshape(-1)[place]
        goes_on = np.flatnonzero(before.reshape(-1)[place] & ~self._begins[flat])
        word = np.minimum(np.searchsorted(first, goes_on), len(first) - 1)
        hashes[word[first[word] == goes_on]] = NO_WORD
        breaks_off = np.flatnonzero(after.reshape(-1)[place] & ~self._ends[flat])
        word = np.maximum(np.searchsorted(last, breaks_off, side="right") - 1, 0)
        hashes[word[last[word] == breaks_off]] = NO_WORD

    def _spell_out(
        self, flat: np.ndarray, unit_begins: np.ndarray, hashes: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Split units that have characters in pieces again, as text, and correct hashes, first and last of words."""
        unit = np.cumsum(unit_begins) - 1
        bounds = np.append(np.flatnonzero(unit_begins), len(flat))
        again = np.zeros(len(bounds) - 1, bool)
        again[unit[self._broken[flat]]] = True
        stay = ~again[unit[first]]
        begins, ends = bounds[:-1][again], bounds[1:][again]
        spelt = []
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            ids = tuple(flat[begin:end].tolist())
            if ids not in self._slow:
                if len(self._slow) == _SLOW:
                    self._slow.clear()
                self._slow[ids] = self._split(ids)
            spelt.append(self._slow[ids])
        own, own_first, own_last = (np.concatenate(parts) for parts in zip(*spelt, strict=True))
        of = np.repeat(np.arange(len(spelt)), [len(each[0]) for each in spelt])
        own_first, own_last = own_first + begins[of], own_last + begins[of]
        opens = (of[1:] == of[:-1]) & (own_first[1:] > own_last[:-1])  # a word that shares no token with the one before
        unit_begins[own_first[1:][opens]] = True
        hashes, first, last = hashes[stay], first[stay], last[stay]
        where = np.searchsorted(first, own_first)
        return np.insert(hashes, where, own), np.insert(first, where, own_first), np.insert(last, where, own_last)

    def _split(self, ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the hashes, the first and the last tokens of the words that tokens spell."""
        pieces = [self._bytes[number] for number in ids]
        token = np.repeat(np.arange(len(ids)), [len(piece) for piece in pieces])  # of each byte
        text = b"".join(pieces).decode(errors="surrogateescape")  # a cut character's bytes stay countable
        whole = "".join("\ufffd" if "\udc80" <= character <= "\udcff" else character for character in text)
        words = self._splitter.split(whole)
        lengths = np.array([len(each) for each in words], dtype=np.int64)
        ends = np.cumsum(lengths)  # in normalised characters
        origin: list[tuple[int, int]] = []  # its first and last byte
        byte = 0
        for raw, character in zip(text, whole, strict=True):
            size = len(raw.encode(errors="surrogateescape"))
            origin += [(byte, byte + size - 1)] * len("".join(self._splitter.normalize(character).split()))
            byte += size
        bytes_of = np.array(origin, dtype=np.int64).reshape(-1, 2)
        return hash_words(words), token[bytes_of[ends - lengths, 0]], token[bytes_of[ends - 1, 1]]


@dataclass(frozen=True)
class Words:
    """The words in rows of tokens, W of them, and the N usable tokens they are made of.

    Attributes:
        place: Place of each usable token in the flattened rows (N,).
        unit_begins: Whether a usable token is the first of those that belong together whatever is masked (N,).
        adjacent: Whether the token before a usable token is usable, too, and in its row (N,).
        hashes: Each word's hash (W,), `NO_WORD` where its spelling is not known.
        first: Its first token, as a number among the usable (W,).
        last: Its last token (W,).
    """

    place: np.ndarray
    unit_begins: np.ndarray
    adjacent: np.ndarray
    hashes: np.ndarray
    first: np.ndarray
    last: np.ndarray
