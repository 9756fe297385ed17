"""`lightning-iclr pmi-vocabulary`: from a corpus to a masking vocabulary, a table of what is in it, and pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_iclr.pmi_masking.corpora import TextSource, read_corpora
from lightning_iclr.pmi_masking.hashing import hash_words
from lightning_iclr.pmi_masking.ngrams import NgramTable
from lightning_iclr.pmi_masking.pictures import draw_coverage, draw_naive_against_pmi, draw_ranks
from lightning_iclr.pmi_masking.scores import Score, naive_pmi_score, pmi_score
from lightning_iclr.pmi_masking.vocabulary import MaskingVocabulary, VocabularySettings
from lightning_iclr.tables import DataFiles

_SHOWN = 5  # n-grams at either end of a length
_COVERED = 2000  # texts of which coverage is drawn
_SIZES = 6  # points of a curve of coverage
_RANKINGS: dict[str, Score] = {"PMI": "pmi", "Naive-PMI": "naive_pmi", "frequency": "frequency"}


def build_vocabulary(
    data: str | list[TextSource],
    out: str,
    config_name: str | None = None,
    revision: str | None = None,
    data_files: DataFiles = None,
    split: str = "train",
    text_column: str = "text",
    spill_dir: str | None = None,
    figures: str | None = None,
    **settings: Any,
) -> None:
    """Count the n-grams of a corpus, take the best, write them to a file and show some.

    Args:
        data: Hub id, folder or file of a data set of texts, or an embedded one: glosses, wikipedia or shakespeare; or
            several sources, such as '[{dataset: wikimedia/wikipedia, config_name: 20231101.en}, {dataset: books/}]'.
        out: File to write: ``.parquet`` with counts and scores, or text with an n-gram a line.
        config_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        split: Part to count, with slices such as ``train[:10%]``; of several sources that of each.
        text_column: Column of texts.
        spill_dir: Folder for what exceeds the memory; a run that was stopped goes on from it.
        figures: Folder for pictures: scores by rank, coverage by size, and Naive-PMI against PMI.
        settings: The arguments of `VocabularySettings`.
    """
    wanted = VocabularySettings(**settings)
    if not Path(out).resolve().parent.is_dir():
        raise ValueError(f"out must be a file in a folder that exists, got {out}")
    if figures is not None:
        Path(figures).mkdir(parents=True, exist_ok=True)
    own = TextSource(data, config_name, revision, data_files, text_column)
    sources = data if isinstance(data, list) else [own]
    for source in sources:
        source.prepare()
    corpus = read_corpora(sources, {"split": split})["split"]
    table, words = wanted.count(corpus, spill_dir=spill_dir, progress_bar=True)
    vocabulary = wanted.rank(table, words)
    vocabulary.save(out)
    print(summary(vocabulary))
    print(f"wrote {len(vocabulary):,} n-grams to {out}")
    if figures is not None:
        for name, figure in draw(vocabulary, wanted, table, words, list(islice(corpus, _COVERED))):
            figure.savefig(Path(figures) / f"{name}.png", dpi=120)
            print(f"drew {Path(figures) / name}.png")


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


def draw(
    vocabulary: MaskingVocabulary,
    settings: VocabularySettings,
    table: NgramTable,
    words: Sequence[str],
    texts: Sequence[str],
) -> Iterator[tuple[str, Figure]]:
    """Yield the pictures of a vocabulary, each with its name.

    Args:
        vocabulary: What has been built.
        settings: How it was built.
        table: The frequent n-grams that it was chosen of.
        words: What their word ids stand for.
        texts: What coverage is drawn of.
    """
    entries, scores, lengths = (vocabulary.table[name].to_numpy() for name in ("words", "score", "n"))
    found = np.unique(lengths).tolist()
    yield "ranks", draw_ranks({n: scores[lengths == n] for n in found}, {n: entries[lengths == n] for n in found})
    sizes = np.unique(np.geomspace(min(100, len(vocabulary)), len(vocabulary), _SIZES).astype(int)).tolist()
    split = [hash_words(vocabulary.splitter.split(text)) for text in texts]
    hashes, run = np.concatenate(split), np.repeat(np.arange(len(split)), [len(own) for own in split])
    shares: dict[str, list[float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a length has fewer has been told
        for name, score in _RANKINGS.items():
            ranked = (replace(settings, score=score, size=size).rank(table, words) for size in sizes)
            shares[name] = [float((each.covering(hashes, run) > 0).mean()) for each in ranked]
    yield "coverage", draw_coverage(sizes, shares)
    spelling = np.array(words, dtype=object)
    for n in range(3, table.max_n + 1):  # of pairs the two are one
        names = [" ".join(row) for row in spelling[table.ngrams(n)]]
        if names:
            figure = draw_naive_against_pmi(naive_pmi_score(table, n), pmi_score(table, n), names, n)
            yield f"naive_pmi_against_pmi_{n}", figure
