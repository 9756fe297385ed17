"""Small corpora, slow counts of them, and small tokenizers of every kind, for the tests of PMI-Masking."""

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import combinations, pairwise
from math import log

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_iclr.embedded import load_wikipedia_sample
from lightning_iclr.pmi_masking.ngrams import NgramTable
from lightning_iclr.pmi_masking.vocabulary import MaskingVocabulary

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KINDS = ["wordpiece", "byte_bpe", "unigram", "byte_fallback"]


def zipf_documents(seed: int, size: int, words: int = 300) -> list[np.ndarray]:
    """Return documents of random length with Zipf's frequencies, breaks (some in a row) and planted phrases."""
    rng = np.random.default_rng(seed)
    ids = rng.zipf(1.3, size) % words
    phrases = rng.integers(0, words, (10, 5))
    for begin in rng.integers(0, size - 5, size // 40):
        ids[begin : begin + 5] = phrases[rng.integers(10)]
    ids[rng.random(size) < 0.05] = -1
    ids[rng.random(size) < 0.02] = -1
    return np.split(ids.astype(np.int32), np.sort(rng.integers(0, size, size // 500)))


def count_by_hand(documents: list[np.ndarray], max_n: int) -> list[Counter]:
    """Return the occurrences of every n-gram, for each length, that holds no break."""
    counts = [Counter() for _ in range(max_n)]
    for document in documents:
        ids = document.tolist()
        for n in range(1, max_n + 1):
            windows = zip(*(ids[offset:] for offset in range(n)), strict=False)
            counts[n - 1].update(window for window in windows if min(window) >= 0)
    return counts


def as_dicts(table: NgramTable) -> list[dict]:
    """Return a table as a dictionary from words to count, for each length, in the table's order."""
    return [
        dict(zip(map(tuple, table.ngrams(n).tolist()), table.counts[n - 1].tolist(), strict=True))
        for n in range(1, table.max_n + 1)
    ]


def assert_equal_tables(table: NgramTable, other: NgramTable) -> None:
    """Check that two tables are equal entry by entry, in order, and of equal types."""
    assert table.totals == other.totals
    np.testing.assert_array_equal(table.words, other.words)
    for ours, theirs in zip(table.parents + table.counts, other.parents + other.counts, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def segmentations(words: tuple) -> Iterator[list[tuple]]:
    """Yield all cuts of words into two or more segments: 2^(n-1) - 1 of them."""
    inner = range(1, len(words))
    for cuts in range(1, len(words)):
        for places in combinations(inner, cuts):
            bounds = [0, *places, len(words)]
            yield [words[begin:end] for begin, end in pairwise(bounds)]


class SlowScores:
    """Scores of n-grams from a Counter for each length, segmentation by segmentation."""

    def __init__(self, counts: list[Counter]) -> None:
        self.counts, self.totals = counts, [count.total() for count in counts]

    def log_p(self, words: tuple) -> float:
        return log(self.counts[len(words) - 1][words] / self.totals[len(words) - 1])

    def pmi(self, words: tuple, weight: float = 1.0) -> float:
        """Return equation 3."""
        return weight * self.log_p(words) - max(sum(map(self.log_p, cut)) for cut in segmentations(words))

    def naive_pmi(self, words: tuple, weight: float = 1.0) -> float:
        """Return equation 2."""
        return weight * self.log_p(words) - sum(self.log_p((word,)) for word in words)


def list_of(*entries: str) -> MaskingVocabulary:
    """Return a vocabulary of these n-grams."""
    lengths = pa.array([len(entry.split(" ")) for entry in entries], pa.int8())
    nulls = pa.nulls(len(entries))
    columns = {"words": list(entries), "n": lengths, "count": nulls.cast("int64"), "score": nulls.cast("float64")}
    return MaskingVocabulary(pa.table(columns))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@cache
def paragraphs() -> list[str]:
    """Return 4,812 paragraphs of Wikipedia, with names, numbers, accents, quotation marks and foreign scripts."""
    return [paragraph["text"] for article in load_wikipedia_sample() for paragraph in article["paragraphs"]]


@cache
def make_tokenizer(kind: str):
    """Return a tokenizer of about 8,000 pieces: one uncased, three cased."""
    trained = dict(special_tokens=SPECIAL, show_progress=False, vocab_size=8000)
    if kind == "wordpiece":
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer(**trained)
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
    elif kind == "byte_bpe":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(initial_alphabet=alphabet, **trained)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="[UNK]", **trained)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:  # SentencePiece's BPE, where rare characters are written in bytes
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]"))
        trained["special_tokens"] = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(limit_alphabet=80, **trained)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.train_from_iterator(paragraphs()[:400], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names_of_special_tokens())


def names_of_special_tokens() -> dict[str, str]:
    """Return the arguments that tell transformers the special tokens."""
    return {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}


@cache
def letters_tokenizer():
    """Return a WordPiece over the words a to z, of which a word such as ``abc`` makes three tokens: a ##b ##c."""
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), ",", "."]
    words = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names_of_special_tokens())
