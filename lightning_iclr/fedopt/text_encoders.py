"""Encode text for next characters, next words and tags, as the original code does; an encoder is as in `encoders`.

Letters: B rows, E examples, L positions of a sequence, V words, T tags.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from lightning_iclr.fedopt.encoders import Columns, Expanded

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table

SHAKESPEARE_CHARACTERS = "".join(
    sorted("\n\r " + string.ascii_letters + string.digits + "!\"#$%&'()*,-./:;?@[]_")
)  # the benchmark's 86, whose order is arbitrary


@dataclass(frozen=True)
class CharacterEncoder:
    """Encode text as windows of characters and the same windows one character later (B, L).

    As in the original, a row of text becomes: a start sign, its characters, an end sign, padded to a multiple of L + 1
    and cut there; each piece of L + 1 gives L inputs and L targets. So a row makes one example or more, and the next
    character is predicted at each position but over the cuts. Padding is 0, characters count from 1; then come the
    sign for all other characters, start and end: with the benchmark's 86 characters 90 signs in all.

    With ``next_column`` a row is a window itself, such as those of ``flwrlabs/shakespeare``: L characters, and the one
    after them; there are no start and end signs then.

    Args:
        text_column: Column of texts.
        next_column: Column of the character after each text, where texts are ready windows.
        sequence_length: Characters of a window; L.
        vocabulary: The characters that are told apart.

    Raises:
        ValueError: ``sequence_length`` is below 1, or ``vocabulary`` repeats a character.

    Examples:
        >>> encode = CharacterEncoder(sequence_length=4, vocabulary="abc")
        >>> encode.serve(encode({"text": ["abca!"]}).tensors, None)
        (tensor([[5, 1, 2, 3],
                [4, 6, 0, 0]]), tensor([[1, 2, 3, 1],
                [6, 0, 0, 0]]))
    """

    text_column: str = "text"
    next_column: str | None = None
    sequence_length: int = 80
    vocabulary: str = SHAKESPEARE_CHARACTERS

    augments = False

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {self.sequence_length}")
        if len(set(self.vocabulary)) < len(self.vocabulary):
            repeated = next(c for c, count in Counter(self.vocabulary).items() if count > 1)
            raise ValueError(f"vocabulary must hold each character once, got {repeated!r} twice")

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by argument."""
        named = {"text_column": self.text_column, "next_column": self.next_column}
        return {argument: column for argument, column in named.items() if column is not None}

    @property
    def num_tokens(self) -> int:
        """How many signs there are, with padding."""
        return len(self.vocabulary) + 4

    @cached_property
    def _table(self) -> np.ndarray:
        known = np.frombuffer(self.vocabulary.encode("utf-32-le"), np.uint32)
        table = np.full(int(known.max(initial=0)) + 2, len(self.vocabulary) + 1)  # the last entry is for all others
        table[known] = np.arange(1, len(known) + 1)
        return table

    def _numbers(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        return self._table[np.minimum(codes, len(self._table) - 1)]

    def __call__(self, columns: Columns) -> tuple[Tensor, ...] | Expanded:
        """Return windows (E, L + 1) of signs, and the row that each comes from."""
        texts = columns[self.text_column]
        dtype = np.uint8 if self.num_tokens <= 256 else np.int32
        if self.next_column is not None:
            texts = [text + character for text, character in zip(texts, columns[self.next_column], strict=True)]
            for row, text in enumerate(texts):
                if len(text) != self.sequence_length + 1:
                    raise ValueError(
                        f"text_column={self.text_column!r} must hold {self.sequence_length} characters and "
                        f"next_column={self.next_column!r} one, got {len(text)} in all in row {row}; "
                        "set sequence_length"
                    )
            return (torch.from_numpy(self._numbers("".join(texts)).astype(dtype)).view(len(texts), -1),)
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        width = self.sequence_length + 1
        windows = -(-(lengths + 2) // width)
        # One flat row of all windows: each text starts at a window's start.
        starts = (np.cumsum(windows) - windows) * width
        flat = np.zeros(int(windows.sum()) * width, dtype=dtype)
        flat[starts] = self.num_tokens - 2
        flat[starts + lengths + 1] = self.num_tokens - 1
        before = np.cumsum(lengths) - lengths
        places = np.arange(int(lengths.sum())) + np.repeat(starts + 1 - before, lengths)
        flat[places] = self._numbers("".join(texts))
        return Expanded(
            (torch.from_numpy(flat).view(-1, width),), torch.from_numpy(np.repeat(range(len(texts)), windows))
        )

    def serve(self, tensors: tuple[Tensor, ...], generators: Sequence[Generator] | None) -> tuple[Tensor, ...]:
        """Return inputs (B, L) and the same one character later (B, L)."""
        return _shifted(tensors[0])

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the texts of signs (B, L), a character for each; pictures stand for padding, other, start and end.

        Examples:
            >>> CharacterEncoder(vocabulary="abc").decode(torch.tensor([[5, 1, 4, 3, 6, 0]]))
            ['␂a␦c␃␀']
        """
        signs = dict(enumerate(f"␀{self.vocabulary}␦␂␃"))
        return ["".join(signs.get(sign, "␦") for sign in row) for row in tokens.tolist()]


@dataclass(frozen=True)
class WordEncoder:
    """Encode sentences as word numbers and the same one word later (B, L).

    As in the original, a sentence becomes: a start sign, its first L words, and an end sign if it has fewer than L;
    the rest is padding. Padding is 0, words count from 1; then come the sign for all other words, start and end.

    Args:
        tokens_column: Column of sentences: words with spaces between them, or lists of words.
        sequence_length: Words of a sentence; L.
        vocabulary: The words: a file with one a line (what follows the word on a line is left out), the words
            themselves, or ``None`` for the most frequent ones of the training part.
        vocabulary_size: Words that are told apart, at most.

    Raises:
        ValueError: A number is below 1.

    Examples:
        >>> encode = WordEncoder(sequence_length=3, vocabulary=("how", "to"))
        >>> encode.serve(encode({"tokens": ["how to", "to fly to"]}), None)
        (tensor([[4, 1, 2],
                [4, 2, 3]]), tensor([[1, 2, 5],
                [2, 3, 2]]))
    """

    tokens_column: str = "tokens"
    sequence_length: int = 20
    vocabulary: str | tuple[str, ...] | None = None
    vocabulary_size: int = 10_000

    augments = False

    def __post_init__(self) -> None:
        for name in ("sequence_length", "vocabulary_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by argument."""
        return {"tokens_column": self.tokens_column}

    def fit(self, table: Table) -> WordEncoder:
        """Return an encoder with the vocabulary of the training rows, or of its file."""
        return replace(self, vocabulary=_vocabulary(self.vocabulary, self.vocabulary_size, table, self.tokens_column))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return _numbered(self.vocabulary)

    @property
    def num_tokens(self) -> int:
        """How many signs there are, with padding; known after `fit`."""
        return len(self._numbers) + 4

    def __call__(self, columns: Columns) -> tuple[Tensor, ...]:
        """Return sentences (B, L + 1) of word numbers."""
        sentences = [_words(sentence)[: self.sequence_length] for sentence in columns[self.tokens_column]]
        other, start, end = (self.num_tokens - place for place in (3, 2, 1))
        numbers = np.zeros((len(sentences), self.sequence_length + 1), np.int16 if end < 2**15 else np.int32)
        for row, words in zip(numbers, sentences, strict=True):
            signs = [start, *(self._numbers.get(word, other) for word in words)]
            if len(words) < self.sequence_length:
                signs.append(end)
            row[: len(signs)] = signs
        return (torch.from_numpy(numbers),)

    def serve(self, tensors: tuple[Tensor, ...], generators: Sequence[Generator] | None) -> tuple[Tensor, ...]:
        """Return inputs (B, L) and the same one word later (B, L)."""
        return _shifted(tensors[0])

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the sentences of word numbers (B, L), with signs such as ``<end>`` for what is no word.

        Examples:
            >>> WordEncoder(vocabulary=("how", "to")).decode(torch.tensor([[4, 1, 2, 3, 5, 0]]))
            ['<start> how to <other> <end> <padding>']
        """
        signs = dict(enumerate(["<padding>", *self._numbers, "<other>", "<start>", "<end>"]))
        # A network may have outputs for more words than the data have.
        return [" ".join(signs.get(sign, "<other>") for sign in row) for row in tokens.tolist()]


@dataclass(frozen=True)
class TagEncoder:
    """Encode questions as bags of words (B, V) and their tags as zeros and ones (B, T).

    An entry of the bag is the share of the word among all words of text and title. As in the original, words outside
    of the vocabulary count in the whole and have no entry of their own, and tags outside of theirs are left out. Where
    there is no word at all the bag is 0; the original's is not a number.

    Args:
        tokens_column: Column of texts: words with spaces between them, or lists of words.
        title_column: Column of titles, read like the text; ``None`` for none.
        tags_column: Column of tags: words with bars between them, or lists of words.
        vocabulary: The words: a file with one a line (what follows the word on a line is left out), the words
            themselves, or ``None`` for the most frequent ones of the training part, in text and title.
        vocabulary_size: Words that are told apart, at most; V.
        tags: The tags, like ``vocabulary``.
        num_tags: Tags that are predicted, at most; T.

    Raises:
        ValueError: A number is below 1.

    Examples:
        >>> encode = TagEncoder(title_column=None, vocabulary=("a", "b"), vocabulary_size=2, tags=("x",), num_tags=1)
        >>> encode({"tokens": ["a b a c"], "tags": ["x|y"]})
        (tensor([[0.5000, 0.2500]]), tensor([[1.]]))
    """

    tokens_column: str = "tokens"
    title_column: str | None = "title"
    tags_column: str = "tags"
    vocabulary: str | tuple[str, ...] | None = None
    vocabulary_size: int = 10_000
    tags: str | tuple[str, ...] | None = None
    num_tags: int = 500

    in_memory = False  # ten thousand floats a row

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "num_tags"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by argument."""
        named = {
            "tokens_column": self.tokens_column,
            "title_column": self.title_column,
            "tags_column": self.tags_column,
        }
        return {argument: column for argument, column in named.items() if column is not None}

    def fit(self, table: Table) -> TagEncoder:
        """Return an encoder with the vocabularies of the training rows, or of its files."""
        texts = [column for column in (self.tokens_column, self.title_column) if column is not None]
        return replace(
            self,
            vocabulary=_vocabulary(self.vocabulary, self.vocabulary_size, table, *texts),
            tags=_vocabulary(self.tags, self.num_tags, table, self.tags_column, separator="|"),
        )

    @property
    def class_names(self) -> list[str]:
        """The tags, and a number for each that the data lack; known after `fit`."""
        tags = list(self._numbers[1])
        return tags + [str(place) for place in range(len(tags), self.num_tags)]

    @cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        return _numbered(self.vocabulary), _numbered(self.tags)

    def __call__(self, columns: Columns) -> tuple[Tensor, ...]:
        """Return bags (B, V) and tags (B, T)."""
        texts = [_words(text) for text in columns[self.tokens_column]]
        if self.title_column is not None:
            texts = [text + _words(title) for text, title in zip(texts, columns[self.title_column], strict=True)]
        tags = [_words(tags, "|") for tags in columns[self.tags_column]]
        word_numbers, tag_numbers = self._numbers
        # The widths are those of the networks, also where the data have fewer words.
        bags, targets = torch.zeros(len(texts), self.vocabulary_size), torch.zeros(len(texts), self.num_tags)
        for bag, words in zip(bags, texts, strict=True):
            known = [word_numbers[word] - 1 for word in words if word in word_numbers]
            bag.index_add_(0, torch.tensor(known, dtype=torch.int64), torch.full((len(known),), 1 / max(1, len(words))))
        for target, names in zip(targets, tags, strict=True):
            target[[tag_numbers[name] - 1 for name in names if name in tag_numbers]] = 1.0
        return bags, targets


def _shifted(sequences: Tensor) -> tuple[Tensor, Tensor]:
    sequences = sequences.long()
    return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()


def _words(text: Any, separator: str = " ") -> list[str]:
    words = text.split(separator) if isinstance(text, str) else list(text or ())
    return [word for word in words if word]


def _numbered(words: str | tuple[str, ...] | None) -> dict[str, int]:
    if words is None or isinstance(words, str):
        raise ValueError("the vocabulary is not known yet; call fit(table) first, as FederatedDataModule.setup does")
    return {word: number for number, word in enumerate(words, start=1)}


def _vocabulary(
    given: str | tuple[str, ...] | None, size: int, table: Table, *columns: str, separator: str = " "
) -> tuple[str, ...]:
    if given is None:
        return _most_frequent(table, columns, size, separator)
    if isinstance(given, str):
        lines = Path(given).read_text(encoding="utf-8").splitlines()
        given = tuple(line.split()[0] for line in lines if line.split())
    return _without_repetition(given[:size])


def _without_repetition(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))


def _most_frequent(table: Table, columns: Sequence[str], size: int, separator: str) -> tuple[str, ...]:
    """Return the most frequent words; equally frequent ones by the alphabet."""
    import pyarrow
    import pyarrow.compute

    counts: Counter[str] = Counter()
    for part in table.select_columns(list(columns)).with_format("arrow").iter(batch_size=50_000):
        for name in columns:
            column = part[name]
            if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                column = pyarrow.compute.split_pattern(column, separator)
            words = pyarrow.compute.value_counts(pyarrow.compute.list_flatten(column)).to_pylist()
            counts.update({entry["values"]: entry["counts"] for entry in words if entry["values"]})
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return tuple(word for word, _ in ranked[:size])
