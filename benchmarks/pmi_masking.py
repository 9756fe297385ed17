"""Measure PMI-Masking: `claim` compares maskings, `speed` times collators and counting against their peers.

    python benchmarks/pmi_masking.py claim     # what a small BERT learns under each masking
    python benchmarks/pmi_masking.py speed     # collators and n-gram counts, ratios of CPU time
    python benchmarks/pmi_masking.py memory    # counting 1 GB of word ids within 100 MB

Every command writes its part of ``benchmarks/results/pmi_masking.json`` with versions, machine, date and seeds.
"""

import argparse
import os
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from pmi_masking_claim import MASKINGS, claim
from results_file import save
from transformers import DataCollatorForLanguageModeling

from lightning_iclr.embedded import load_wordnet
from lightning_iclr.pmi_masking import (
    MaskingVocabulary,
    PMIMaskingCollator,
    RandomSpanCollator,
    RandomTokenCollator,
    WholeWordCollator,
    count_ngrams,
    load_glosses,
    load_tokenizer,
    pmi_score,
)
from lightning_iclr.pmi_masking.words import WordIds, WordSplitter, is_punctuation

BATCH, LENGTH = 256, 512


class StringSetCollator:
    """PMI-Masking with a set of strings and loops over tokens: the way of the collators that users share."""

    def __init__(self, tokenizer: Any, ngrams: set[str], max_n: int = 5) -> None:
        self.tokenizer, self.ngrams, self.max_n = tokenizer, ngrams, max_n
        self.special = set(tokenizer.all_special_ids)

    def __call__(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = torch.tensor(rows), torch.full((len(rows), len(rows[0])), -100)
        for number, row in enumerate(rows):
            words: list[list[int]] = []
            tokens = self.tokenizer.convert_ids_to_tokens(row)
            for place, token in enumerate(tokens):
                if row[place] in self.special:
                    continue
                if token.startswith("##") and words:
                    words[-1].append(place)
                else:
                    words.append([place])
            spelt = ["".join(tokens[place].removeprefix("##") for place in word) for word in words]
            units, start = [], 0
            while start < len(words):
                for n in range(min(self.max_n, len(words) - start), 0, -1):
                    if n == 1 or " ".join(spelt[start : start + n]) in self.ngrams:
                        units.append([place for word in words[start : start + n] for place in word])
                        start += n
                        break
            random.shuffle(units)
            left = max(1, round(0.15 * sum(map(len, words))))
            for unit in units:
                if len(unit) > left:
                    continue
                left -= len(unit)
                draw = random.random()
                for place in unit:
                    labels[number, place] = row[place]
                    if draw < 0.8:
                        inputs[number, place] = self.tokenizer.mask_token_id
                    elif draw < 0.9:
                        inputs[number, place] = random.randrange(len(self.tokenizer))
        return inputs, labels


def interleaved(arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return CPU seconds of each arm in each repeat, after one that does not count."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(-1, repeats):
        for arm in arms if number % 2 else reversed(list(arms)):
            begin = time.process_time()
            arms[arm]()
            if number >= 0:
                seconds[arm].append(time.process_time() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> dict[str, Any]:
    own = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    quartiles = statistics.quantiles(own, n=4)
    return {"median": statistics.median(own), "quartiles": [quartiles[0], quartiles[2]]}


def collators(repeats: int) -> dict[str, Any]:
    """Time one batch of 256 rows of 512 tokens."""
    tokenizer = load_tokenizer("embedded")
    texts = load_glosses()["train"]["text"]
    vocabulary = MaskingVocabulary.build(texts, size=40_000, min_count=3)
    text = " ".join(load_wordnet()["gloss"][:20_000])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"][: BATCH * LENGTH]).reshape(BATCH, LENGTH)
    offsets = np.array(encoded["offset_mapping"][: BATCH * LENGTH]).reshape(BATCH, LENGTH, 2)
    tensors = {"input_ids": torch.from_numpy(ids)}
    lists = [{"input_ids": row} for row in ids.tolist()]
    with_offsets = [
        {"input_ids": row, "offset_mapping": own} for row, own in zip(ids.tolist(), offsets.tolist(), strict=True)
    ]
    hf = DataCollatorForLanguageModeling(tokenizer)
    hf_words = DataCollatorForLanguageModeling(
        tokenizer, whole_word_mask=True, mask_replace_prob=1, random_replace_prob=0
    )
    strings = StringSetCollator(tokenizer, set(vocabulary.table["words"].to_pylist()))
    token, word = RandomTokenCollator(tokenizer), WholeWordCollator(tokenizer)
    span, pmi = RandomSpanCollator(tokenizer), PMIMaskingCollator(tokenizer, vocabulary)
    seconds = interleaved(
        {
            "hf_random_token_tensors": lambda: hf.torch_mask_tokens(tensors["input_ids"].clone()),
            "hf_random_token_lists": lambda: hf(lists),
            "hf_whole_word_lists": lambda: hf_words([dict(row) for row in with_offsets]),
            "hf_whole_word_tensors": lambda: hf_words.torch_mask_tokens(
                tensors["input_ids"].clone(), offset_mapping=torch.from_numpy(offsets)
            ),
            "string_set_lists": lambda: strings(ids.tolist()),
            "random_token_tensors": lambda: token(tensors),
            "random_token_lists": lambda: token(lists),
            "whole_word_tensors": lambda: word(tensors),
            "random_span_tensors": lambda: span(tensors),
            "pmi_tensors": lambda: pmi(tensors),
            "pmi_lists": lambda: pmi(lists),
        },
        repeats,
    )
    return {
        "batch": [BATCH, LENGTH],
        "vocabulary": len(vocabulary),
        "milliseconds": {arm: 1000 * statistics.median(values) for arm, values in seconds.items()},
        "hf_whole_word_over_pmi_tensors": ratio(seconds, "hf_whole_word_tensors", "pmi_tensors"),
        "hf_whole_word_over_pmi_lists": ratio(seconds, "hf_whole_word_lists", "pmi_lists"),
        "string_set_over_pmi_lists": ratio(seconds, "string_set_lists", "pmi_lists"),
        "pmi_over_whole_word": ratio(seconds, "pmi_tensors", "whole_word_tensors"),
        "random_token_over_hf_tensors": ratio(seconds, "random_token_tensors", "hf_random_token_tensors"),
        "random_token_over_hf_lists": ratio(seconds, "random_token_lists", "hf_random_token_lists"),
    }


def counting(repeats: int) -> dict[str, Any]:
    """Time counts and scores of the glosses' word ids, repeated in another order, against a Counter."""
    splitter = WordSplitter()
    texts = load_glosses()["train"]["text"]
    documents = list(WordIds(splitter).encode_all(texts))

    def ours() -> Any:
        table = count_ngrams(documents, min_count=11)
        return table, [pmi_score(table, n) for n in range(2, 6)]

    def counter() -> list[Counter[tuple[int, ...]]]:
        lists = [document.tolist() for document in documents]
        counts: list[Counter[tuple[int, ...]]] = []
        for n in range(1, 6):
            level: Counter[tuple[int, ...]] = Counter()
            for ids in lists:
                level.update(ngram for ngram in zip(*(ids[i:] for i in range(n)), strict=False) if min(ngram) >= 0)
            counts.append(level)
        return counts

    table, _ = ours()
    for n, level in enumerate(counter(), start=1):  # equal results
        frequent = sorted((ngram, count) for ngram, count in level.items() if count >= 11)
        assert frequent == list(zip(map(tuple, table.ngrams(n).tolist()), table.counts[n - 1].tolist(), strict=True))

    def plain_ids() -> list[list[int]]:
        numbers: dict[str, int] = {}
        return [
            [-1 if is_punctuation(word) else numbers.setdefault(word, len(numbers)) for word in splitter.split(text)]
            for text in texts[:20_000]
        ]

    seconds = interleaved({"ours": ours, "counter": counter}, repeats)
    reading = interleaved(
        {"word_ids": lambda: list(WordIds(splitter).encode_all(texts[:20_000])), "splitter_and_dict": plain_ids},
        repeats,
    )
    return {
        "words": int(sum(map(len, documents))),
        "frequent": [len(counts) for counts in table.counts],
        "seconds": {arm: statistics.median(values) for arm, values in {**seconds, **reading}.items()},
        "counter_over_ours": ratio(seconds, "counter", "ours"),
        "word_ids_over_splitter_and_dict": ratio(reading, "word_ids", "splitter_and_dict"),
    }


def memory(limit: str = "100MB", words: int = 250_000_000) -> dict[str, Any]:
    """Count a file of 1 GB of word ids within a limit and watch what the process holds beyond what it held before."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.int32"
        with path.open("wb") as file:
            for _ in range(0, words, 5_000_000):
                ids = np.minimum(generator.zipf(1.25, 5_000_000) - 1, 200_000).astype(np.int32)
                ids[generator.random(len(ids)) < 0.05] = -1
                ids.tofile(file)
        del ids

        def documents() -> Iterator[np.ndarray]:
            with path.open("rb") as file:
                while len(ids := np.fromfile(file, np.int32, 10_000)):
                    yield ids

        before, peak, done = _held(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], _held() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        begin, wall = time.process_time(), time.perf_counter()
        table = count_ngrams(documents(), memory_limit=limit, spill_dir=Path(folder) / "spill")
        seconds, wall = time.process_time() - begin, time.perf_counter() - wall
        done.set()
        watcher.join()
    return {
        "words": words,
        "memory_limit": limit,
        "peak_bytes": peak[0],
        "peak_over_limit": peak[0] / 100e6,
        "frequent": [len(counts) for counts in table.counts],
        "cpu_seconds": seconds,
        "wall_seconds": wall,
    }


def _held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["claim", "speed", "memory"])
    parser.add_argument("--repeats", type=int, default=10, help="interleaved repeats")
    parser.add_argument("--seeds", type=int, default=3, help="of claim: 0, 1, ...")
    parser.add_argument("--pieces", type=int, default=2000, help="of claim: of the WordPiece tokenizer")
    parser.add_argument("--steps", type=int, default=3200, help="of claim")
    parser.add_argument(
        "--arms", nargs="+", choices=MASKINGS, default=list(MASKINGS), help="of claim; token and PMI at least"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/pmi_masking_claim"), help="of claim, for finished arms"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    packages = ("transformers", "tokenizers")
    if args.command == "claim":
        found = claim(args.pieces, args.steps, list(range(args.seeds)), args.arms, args.folder)
        save("pmi_masking", "claim", found, (*packages, "scikit-learn"))
    elif args.command == "speed":
        save("pmi_masking", "collators", collators(args.repeats), packages)
        save("pmi_masking", "counting", counting(max(3, args.repeats // 3)), packages)
    else:
        save("pmi_masking", "memory", memory(), packages)


if __name__ == "__main__":
    main()
