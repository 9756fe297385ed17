"""`lightning-iclr pmi-vocabulary`: from a corpus to a masking vocabulary, and a table of what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_iclr.embedded import load_shakespeare, load_wikipedia_sample
from lightning_iclr.pmi_masking.glosses import load_glosses
from lightning_iclr.pmi_masking.ngrams import Engines
from lightning_iclr.pmi_masking.scores import Score
from lightning_iclr.pmi_masking.vocabulary import PROPORTIONS, MaskingVocabulary
from lightning_iclr.pmi_masking.words import Deduplicate, Punctuation
from lightning_iclr.tables import DataFiles, check_columns, prepare_tables, read_tables, select_split

EMBEDDED = ("glosses", "wikipedia", "shakespeare")
_SHOWN = 5  # n-grams at either end of a length
_READ = 1000  # texts at once


def build_vocabulary(
    data: str,
    out: str,
    config_name: str | None = None,
    revision: str | None = None,
    data_files: DataFiles = None,
    split: str = "train",
    text_column: str = "text",
    size: int = 800_000,
    proportions: tuple[float, ...] = PROPORTIONS,
    score: Score = "pmi",
    count_weight: float = 1.0,
    min_count: int = 11,
    lowercase: bool = True,
    strip_accents: bool = True,
    punctuation: Punctuation = "break",
    deduplicate: Deduplicate | None = None,
    memory_limit: str = "2GB",
    spill_dir: str | None = None,
    engine: Engines = "numpy",
) -> None:
    """Count the n-grams of a corpus, take the best, write them to a file and show some.

    Args:
        data: Hub id, folder or file of a data set of texts, or an embedded one: glosses, wikipedia or shakespeare.
        out: File to write: ``.parquet`` with counts and scores, or text with an n-gram a line.
        config_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        split: Part to count, with slices such as ``train[:10%]``.
        text_column: Column of texts.
        size: N-grams wanted.
        proportions: Shares of lengths 2, 3, ...
        score: What ranks the n-grams of a length.
        count_weight: Factor of log p(w_1..w_n): 1 as in the paper, 2 as in the released lists.
        min_count: Fewest occurrences.
        lowercase: Whether case is dropped.
        strip_accents: Whether accents are dropped.
        punctuation: Whether a punctuation mark breaks n-grams, or is a word of them.
        deduplicate: Whether to leave out a paragraph (line), or a document, that has occurred before.
        memory_limit: Bytes to count in, such as 2GB.
        spill_dir: Folder for what exceeds them; a run that was stopped goes on from it.
        engine: What counts: numpy, or duckdb or daft (extra scale).
    """
    if not Path(out).resolve().parent.is_dir():
        raise ValueError(f"out must be a file in a folder that exists, got {out}")
    texts = _texts(data, config_name, revision, data_files, split, text_column)
    vocabulary = MaskingVocabulary.build(
        texts,
        size=size,
        proportions=proportions,
        score=score,
        count_weight=count_weight,
        min_count=min_count,
        lowercase=lowercase,
        strip_accents=strip_accents,
        punctuation=punctuation,
        deduplicate=deduplicate,
        memory_limit=memory_limit,
        spill_dir=spill_dir,
        engine=engine,
        progress_bar=True,
    )
    vocabulary.save(out)
    print(summary(vocabulary))
    print(f"wrote {len(vocabulary):,} n-grams to {out}")


def summary(vocabulary: MaskingVocabulary, shown: int = _SHOWN) -> str:
    """Return a table of the best and the worst n-grams of each length, with counts and scores."""
    rows: list[Sequence[str]] = [("n", "rank", "n-gram", "count", "score")]
    table = vocabulary.table
    lengths = table["n"].to_numpy()
    for n in sorted(set(lengths.tolist())):
        places = [place for place, length in enumerate(lengths.tolist()) if length == n]
        ends = places if len(places) <= 2 * shown else [*places[:shown], *places[-shown:]]
        for place in ends:
            row = {name: table[name][place].as_py() for name in table.column_names}
            count = "" if row["count"] is None else f"{row['count']:,}"
            score = "" if row["score"] is None else f"{row['score']:.2f}"
            rows.append((str(n), f"{place - places[0] + 1:,} of {len(places):,}", row["words"], count, score))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _texts(data: str, *source: Any) -> Iterator[str]:
    config_name, revision, data_files, split, text_column = source
    if data == "glosses":
        yield from load_glosses()["train"]["text"]
    elif data == "wikipedia":
        for article in load_wikipedia_sample():
            yield "\n".join(paragraph["text"] for paragraph in article["paragraphs"])
    elif data == "shakespeare":
        yield from load_shakespeare()["text"]
    else:
        prepare_tables(data, config_name, revision, data_files)
        table = select_split(read_tables(data, config_name, revision, data_files), split, "split")
        check_columns(table, {"text_column": text_column}, data)
        for begin in range(0, len(table), _READ):
            yield from table[begin : begin + _READ][text_column]
