"""The masking vocabulary: which n-grams of a corpus are masked as one unit (section 3.4 of the paper)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_warn
from tqdm.auto import tqdm

from lightning_iclr.pmi_masking.hashing import HashSet, hash_words, join_words
from lightning_iclr.pmi_masking.ngrams import Engines, NgramTable, count_ngrams
from lightning_iclr.pmi_masking.scores import Score, frequency_score, naive_pmi_score, pmi_score
from lightning_iclr.pmi_masking.spelling import unspellable
from lightning_iclr.pmi_masking.streams import parse_size
from lightning_iclr.pmi_masking.words import Deduplicate, Punctuation, TokenWords, WordIds, Words, WordSplitter

PROPORTIONS = (0.5, 0.25, 0.125, 0.125)
_SCHEMA = pa.schema([("words", pa.string()), ("n", pa.int8()), ("count", pa.int64()), ("score", pa.float64())])
_METADATA = b"lightning_iclr.pmi_masking"


@dataclass(frozen=True)
class VocabularySettings:
    """What a vocabulary that is built of texts holds.

    Args:
        size: N-grams wanted; the paper's 800,000.
        proportions: Shares of ``size`` for lengths 2, 3, ...; as many as there are lengths.
        score: What ranks the n-grams of a length: ``pmi`` by equation 3, ``naive_pmi`` by equation 2, or ``frequency``.
        count_weight: Factor of log p(w_1..w_n) in the two; 1 is the paper's, 2 that of the released lists.
        min_count: Fewest occurrences; the paper's "more than 10".
        lowercase: Whether case is dropped.
        strip_accents: Whether accents are dropped.
        punctuation: Whether a punctuation mark breaks n-grams, or is a word of them.
        deduplicate: Whether to leave out a paragraph (line), or a document, that has occurred before.
        memory_limit: Bytes to count in, or a string such as 2GB.
        engine: What counts: numpy, or duckdb or daft (extra scale).

    Raises:
        ValueError: A number is outside its range.
    """

    size: int = 800_000
    proportions: Sequence[float] = PROPORTIONS
    score: Score = "pmi"
    count_weight: float = 1.0
    min_count: int = 11
    lowercase: bool = True
    strip_accents: bool = True
    punctuation: Punctuation = "break"
    deduplicate: Deduplicate | None = None
    memory_limit: int | str = "2GB"
    engine: Engines = "numpy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "proportions", tuple(self.proportions))
        for name, number in (("size", self.size), ("min_count", self.min_count)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not self.proportions or min(self.proportions) < 0 or abs(sum(self.proportions) - 1) > 1e-6:
            raise ValueError(
                f"proportions must be shares for lengths 2, 3, ... that add up to 1, got {list(self.proportions)}"
            )
        if self.score not in ("pmi", "naive_pmi", "frequency"):
            raise ValueError(f"score must be 'pmi', 'naive_pmi' or 'frequency', got {self.score!r}")
        if not self.count_weight > 0:
            raise ValueError(f"count_weight must be positive, got {self.count_weight}")
        parse_size(self.memory_limit)

    def count(
        self, texts: Iterable[str], *, spill_dir: str | Path | None = None, progress_bar: bool = False
    ) -> tuple[NgramTable, list[str]]:
        """Return the frequent n-grams of texts and the words that their numbers stand for.

        Args:
            texts: Documents.
            spill_dir: See `count_ngrams`.
            progress_bar: Whether to show progress.
        """
        ids = WordIds(WordSplitter(self.lowercase, self.strip_accents), self.punctuation, self.deduplicate)
        read = tqdm(texts, desc="reading texts", unit="text", disable=not progress_bar)
        table = count_ngrams(
            ids.encode_all(read),
            max_n=len(self.proportions) + 1,
            min_count=self.min_count,
            memory_limit=self.memory_limit,
            spill_dir=spill_dir,
            engine=self.engine,
            progress_bar=progress_bar,
        )
        return table, ids.words

    def rank(self, table: NgramTable, words: Sequence[str]) -> MaskingVocabulary:
        """Return the best of each length of what `count` has returned."""
        spelling = np.array(words, dtype=object)
        parts = []
        for n, share in enumerate(self.proportions, start=2):
            places, scores = _best(table, n, round(self.size * share), self.score, self.count_weight)
            columns = [
                pa.array([" ".join(row) for row in spelling[table.ngrams(n)[places]]], pa.string()),
                pa.array(np.full(len(places), n, np.int8)),
                pa.array(table.counts[n - 1][places]),
                pa.array(scores),
            ]
            parts.append(pa.Table.from_arrays(columns, schema=_SCHEMA))
        return MaskingVocabulary(pa.concat_tables(parts), self.lowercase, self.strip_accents, self.punctuation)


@dataclass(frozen=True)
class MaskingVocabulary:
    """N-grams of two and more words that are masked as one unit.

    Build one by `build`, or read one by `from_file`.

    Args:
        table: A row for each n-gram: ``words`` with one space between, ``n``, ``count`` and ``score``, the latter two
            null where unknown; the best of a length first, the shortest lengths first.
        lowercase: Whether the words are in lower case.
        strip_accents: Whether the words have no accents.
        punctuation: Whether n-grams broke at punctuation marks, or contain them.
    """

    table: pa.Table
    lowercase: bool = True
    strip_accents: bool = True
    punctuation: Punctuation = "break"
    splitter: WordSplitter = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.table.num_rows == 0:
            raise ValueError("a masking vocabulary must have at least one n-gram, got none")
        object.__setattr__(self, "splitter", WordSplitter(self.lowercase, self.strip_accents))

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        *,
        spill_dir: str | Path | None = None,
        progress_bar: bool = False,
        **settings: Any,
    ) -> MaskingVocabulary:
        """Count the n-grams of texts and take the best of each length.

        Args:
            texts: Documents; no n-gram crosses from one to the next.
            spill_dir: See `count_ngrams`.
            progress_bar: Whether to show progress.
            settings: The arguments of `VocabularySettings`.

        Raises:
            ValueError: A number is outside its range, or no n-gram of a length occurs ``min_count`` times.
        """
        chosen = VocabularySettings(**settings)
        return chosen.rank(*chosen.count(texts, spill_dir=spill_dir, progress_bar=progress_bar))

    @classmethod
    def from_file(
        cls, path: str | Path, *, lowercase: bool = True, strip_accents: bool = True, punctuation: Punctuation = "break"
    ) -> MaskingVocabulary:
        """Read a vocabulary.

        Args:
            path: A ``.parquet`` file that `save` wrote, or a text file such as those of the paper's authors: an n-gram
                a line, one space between its words.
            lowercase: Whether a text file's words are in lower case; a parquet file knows.
            strip_accents: Whether a text file's words have no accents; a parquet file knows.
            punctuation: How a text file treats punctuation; a parquet file knows.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a vocabulary; the error names the line or what is missing.
        """
        path = Path(path)
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            metadata = (table.schema.metadata or {}).get(_METADATA)
            missing = [name for name in _SCHEMA.names if name not in table.column_names]
            if metadata is None or missing:
                raise ValueError(f"{path} is not a masking vocabulary: it lacks {', '.join(missing) or 'its settings'}")
            return cls(table.select(_SCHEMA.names).replace_schema_metadata(None), **json.loads(metadata))
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [" ".join(line.split()) for line in lines if line.strip()]
        lengths = [len(entry.split(" ")) for entry in entries]
        for number, line in enumerate(lines, start=1):
            if line.strip() and len(line.split()) < 2:
                raise ValueError(f"line {number} of {path} must hold an n-gram of two or more words, got {line!r}")
        unknown = pa.nulls(len(entries))
        columns = [
            pa.array(entries, pa.string()),
            pa.array(lengths, pa.int8()),
            unknown.cast("int64"),
            unknown.cast("float64"),
        ]
        return cls(pa.Table.from_arrays(columns, schema=_SCHEMA), lowercase, strip_accents, punctuation)

    def save(self, path: str | Path) -> None:
        """Write the vocabulary: to ``.parquet`` with counts and scores, else as the authors' lists, one a line."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # another process may write the same file
        try:
            if path.suffix == ".parquet":
                settings = {
                    "lowercase": self.lowercase,
                    "strip_accents": self.strip_accents,
                    "punctuation": self.punctuation,
                }
                metadata = {_METADATA: json.dumps(settings).encode()}
                pq.write_table(self.table.replace_schema_metadata(metadata), partial)
            else:
                lines = (f"{entry}\n" for entry in self.table["words"].to_pylist())
                partial.write_text("".join(lines), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __contains__(self, ngram: object) -> bool:
        if not isinstance(ngram, str):
            return False
        words = hash_words(self.splitter.split(ngram))
        return len(words) > 1 and bool(self.hashes.contains(join_words(list(words[:, None])))[0])

    @property
    def max_n(self) -> int:
        """The greatest length."""
        return int(np.max(self.table["n"].to_numpy()))

    @cached_property
    def hashes(self) -> HashSet:
        """The n-grams' hashes."""
        found = []
        lengths = self.table["n"].to_numpy()
        for n in np.unique(lengths):
            entries = self.table["words"].filter(pa.array(lengths == n)).to_pylist()
            words = hash_words([word for entry in entries for word in entry.split(" ")])
            found.append(join_words(list(words.reshape(-1, n).T)))
        return HashSet(np.concatenate(found))

    def compile(self, tokenizer: Any) -> NgramMatcher:
        """Return what finds the n-grams in this tokenizer's tokens.

        N-grams with a word that the tokenizer writes with its unknown token match nothing: a warning says how many, and
        names one.
        """
        entries = [entry.split(" ") for entry in self.table["words"].to_pylist()]
        unknown = unspellable(tokenizer, sorted({word for entry in entries for word in entry}))
        skipped = [" ".join(entry) for entry in entries if not unknown.isdisjoint(entry)] if unknown else []
        if skipped:
            rank_zero_warn(
                f"{len(skipped):,} of {len(self):,} n-grams hold words that the tokenizer cannot spell, such as "
                f"{skipped[0]!r}: no match"
            )
        return NgramMatcher(self, TokenWords(tokenizer, self.splitter), len(skipped))

    def coverage(self, texts: Iterable[str]) -> dict[str, float]:
        """Return which share of the texts' words lies in n-grams of the vocabulary; the paper aims at about a half.

        Returns:
            ``words``, the share of all words, and for each length ``n=2``, ... the share whose longest is of it.
        """
        covered = np.zeros(self.max_n + 1, np.int64)
        total = 0
        for text in texts:
            hashes = hash_words(self.splitter.split(text))
            covered += np.bincount(self.covering(hashes, np.zeros(len(hashes), np.int64)), minlength=self.max_n + 1)
            total += len(hashes)
        shares = {f"n={n}": covered[n] / max(total, 1) for n in range(2, self.max_n + 1)}
        return {"words": float(sum(shares.values())), **{name: float(share) for name, share in shares.items()}}

    def covering(self, words: np.ndarray, run: np.ndarray) -> np.ndarray:
        """Return how many words the longest n-gram has that each word lies in (W,), 0 where it lies in none.

        Args:
            words: Their hashes (W,).
            run: See `longest`.
        """
        longest = self.longest(words, run)
        best = np.zeros(len(words), np.int64)
        for n in range(2, self.max_n + 1):
            for offset in range(n):
                best[np.flatnonzero(longest == n) + offset] = n
        return best

    def longest(self, words: np.ndarray, run: np.ndarray) -> np.ndarray:
        """Return how many words the longest n-gram has that begins at each word (W,), 0 where none does.

        Args:
            words: Their hashes (W,).
            run: Number of the run of text each lies in (W,), ascending; n-grams do not cross.
        """
        longest = np.zeros(len(words), np.int64)
        for n in range(2, min(self.max_n, len(words)) + 1):
            inside = np.flatnonzero(run[: len(words) - n + 1] == run[n - 1 :])
            hashes = join_words([words[inside + offset] for offset in range(n)])
            longest[inside[self.hashes.contains(hashes)]] = n
        return longest


class NgramMatcher:
    """Find a vocabulary's n-grams in rows of one tokenizer's tokens.

    Args:
        vocabulary: The n-grams.
        tokens: What the tokenizer's tokens spell.
        skipped: N-grams that hold words the tokenizer cannot spell.
    """

    def __init__(self, vocabulary: MaskingVocabulary, tokens: TokenWords, skipped: int = 0) -> None:
        self.vocabulary, self.tokens, self.skipped = vocabulary, tokens, skipped

    def ends(self, words: Words) -> np.ndarray:
        """Return the last group of the longest n-gram that begins in each group of tokens (G,); else the group itself.

        A group is what `TokenWords.read` says belongs together whatever is masked: a word, as a rule.
        """
        group = np.cumsum(words.unit_begins) - 1  # of each token
        run = np.cumsum(~words.adjacent)[words.first]
        longest = self.vocabulary.longest(words.hashes, run)
        ends = np.arange(group[-1] + 1 if len(group) else 0)
        begins = np.flatnonzero(longest)
        last = group[words.last[begins + longest[begins] - 1]]
        np.maximum.at(ends, group[words.first[begins]], last)
        return ends


def _best(table: NgramTable, n: int, number: int, score: Score, count_weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the best n-grams of a length and their scores, the best first."""
    if not len(table.counts[n - 1]) and number:
        raise ValueError(f"no n-gram of {n} words occurs min_count times; lower min_count, or take more text")
    if score == "frequency":
        scores = frequency_score(table, n)
    else:
        scores = (pmi_score if score == "pmi" else naive_pmi_score)(table, n, count_weight)
    if len(scores) < number:
        rank_zero_warn(f"only {len(scores):,} n-grams of {n} words are frequent, and {number:,} were wanted")
    order = np.argsort(-scores, kind="stable")[:number]  # equal scores in the order of their words
    return order, scores[order]
