"""Texts wherever they lie: one data set or several, and those that ship with the package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_iclr.embedded import load_shakespeare, load_wikipedia_sample, load_wordnet
from lightning_iclr.tables import DataFiles, check_columns, prepare_tables, read_tables, select_split

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetDict

HELD_OUT = {"validation": 4_000, "test": 7_000, "probe": 15_000}
_POS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
_READ = 1000  # rows at once


@dataclass(frozen=True)
class TextSource:
    """A data set of texts.

    Args:
        dataset: Hub id, folder, file, or an embedded corpus: ``glosses``, ``wikipedia`` or ``shakespeare``; in Python
            also a ``Dataset`` or ``DatasetDict``, or a function that returns one.
        config_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        text_column: Column of texts.
        join: Rows in a row that make one text, for data sets with a sentence a row.

    Raises:
        ValueError: ``join`` is below 1.
    """

    dataset: Any
    config_name: str | None = None
    revision: str | None = None
    data_files: DataFiles = None
    text_column: str = "text"
    join: int = 1

    def __post_init__(self) -> None:
        if self.join < 1:
            raise ValueError(f"join must be at least 1, got {self.join}")

    def prepare(self) -> None:
        """Download the data set, or convert its files, where that is not done yet."""
        if isinstance(self.dataset, str) and self.dataset not in _EMBEDDED:
            prepare_tables(self.dataset, self.config_name, self.revision, self.data_files)

    def read(self) -> dict[str, Table]:
        """Return the parts by name."""
        dataset = _EMBEDDED.get(self.dataset, self.dataset) if isinstance(self.dataset, str) else self.dataset
        if callable(dataset):
            dataset = dataset()
        return read_tables(dataset, self.config_name, self.revision, self.data_files)


class Corpus:
    """The texts of one part of a data set, or of several, one after the other; as often as wanted.

    Args:
        tables: The rows of each, and what tells how to read them.
    """

    def __init__(self, tables: Sequence[tuple[Table, TextSource]]) -> None:
        self.tables = tables

    def __len__(self) -> int:
        return sum(-(-len(table) // source.join) for table, source in self.tables)

    def __iter__(self) -> Iterator[str]:
        for table, source in self.tables:
            step = -(-_READ // source.join) * source.join
            for begin in range(0, len(table), step):
                rows = table[begin : begin + step][source.text_column]
                if source.join == 1:
                    yield from rows
                else:
                    yield from ("\n".join(rows[at : at + source.join]) for at in range(0, len(rows), source.join))

    @property
    def fingerprint(self) -> str:
        """What tells apart corpora of other texts."""
        found = hashlib.blake2b(digest_size=16)
        for table, source in self.tables:
            found.update(f"{source.text_column}\0{source.join}\0".encode())
            if table.cache_files:  # the library's own fingerprint tells these apart, and to read them takes minutes
                found.update(str(table._fingerprint).encode())
            else:
                for text in Corpus([(table, source)]):
                    found.update(text.encode() + b"\0")
        return found.hexdigest()


def read_corpora(sources: Sequence[TextSource], splits: Mapping[str, str | None]) -> dict[str, Corpus]:
    """Return the texts of each part, those of all sources together.

    Args:
        sources: The data sets, which have been prepared.
        splits: For each part, by the argument that names it, its split, with slices and sums, taken of each source;
            parts without one are left out.

    Raises:
        ValueError: A source has no such split, or not the column of texts.
    """
    found: dict[str, list[tuple[Table, TextSource]]] = {name: [] for name, spec in splits.items() if spec is not None}
    for source in sources:
        tables = source.read()
        for name, own in found.items():
            table = select_split(tables, str(splits[name]), name)
            check_columns(table, {"text_column": source.text_column}, name)
            own.append((table, source))
    return {name: Corpus(own) for name, own in found.items()}


@cache
def load_glosses(split_seed: int = 0) -> DatasetDict:
    """Load the distinct definitions of WordNet, about 112,500, in four parts without a definition in common.

    A definition is a gloss up to its first quoted example. Columns: ``text``, ``pos`` (noun, verb, adjective or adverb)
    and ``synset``, the row of `load_wordnet` that has it first. Parts: ``train``, ``validation`` (4,000), ``test``
    (7,000), and ``probe`` (15,000) for classifiers on a trained network's features.

    Args:
        split_seed: Seed of the parts.

    Examples:
        >>> load_glosses()["validation"].num_rows
        4000
    """
    from datasets import Dataset, DatasetDict

    synsets = load_wordnet()
    first: dict[str, int] = {}
    for row, gloss in enumerate(synsets["gloss"]):
        first.setdefault(gloss.split('; "')[0].strip(), row)
    texts, rows, kinds = list(first), np.array(list(first.values())), synsets["pos"]
    order = np.random.default_rng(split_seed).permutation(len(texts))
    bounds = np.cumsum(list(HELD_OUT.values()))
    *held_out, train = np.split(order, bounds)
    parts = {}
    for name, places in zip(("train", *HELD_OUT), (train, *held_out), strict=True):
        places = np.sort(places)
        columns = {
            "text": [texts[place] for place in places],
            "pos": [_POS[kinds[row]] for row in rows[places].tolist()],
            "synset": rows[places],
        }
        parts[name] = Dataset.from_dict(columns)
    return DatasetDict(parts)


def _wikipedia() -> Table:
    from datasets import Dataset

    articles = ("\n".join(part["text"] for part in article["paragraphs"]) for article in load_wikipedia_sample())
    return Dataset.from_dict({"text": list(articles)})


_EMBEDDED = {"glosses": load_glosses, "wikipedia": _wikipedia, "shakespeare": load_shakespeare}
