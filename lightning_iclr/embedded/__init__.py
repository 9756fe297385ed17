"""The six small data sets, and a tokenizer, that ship with the package: no download, no further dependency.

Each loader checks its file against the checksum in ``PROVENANCE.md``, which also states origins and licences, and
returns a ``datasets.Dataset``. The files are read as package resources, so a zipped package works as well.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # importing datasets takes over a second, so the loaders do it when called
    from datasets import Dataset

__all__ = [
    "load_digits",
    "load_mnist5k",
    "load_shakespeare",
    "load_wikipedia_sample",
    "load_wordnet",
    "load_wordsim353",
    "read_wordpiece",
]


@cache
def _checksums() -> dict[str, str]:
    text = files(__name__).joinpath("PROVENANCE.md").read_text(encoding="utf-8")
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, re.MULTILINE)}


def _read(name: str) -> bytes:
    content = files(__name__).joinpath(name).read_bytes()
    expected, found = _checksums()[name], hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"the embedded file {name} is damaged: its sha256 should be {expected} and is {found}; "
            "reinstall lightning-iclr"
        )
    return content


def _read_lines(name: str) -> list[str]:
    try:
        import lzma
    except ImportError as error:
        raise ImportError(
            f"reading the embedded file {name} needs Python's lzma module, which this Python was built without; "
            "rebuild it with the xz development files installed, or use another Python"
        ) from error
    return lzma.decompress(_read(name)).decode("utf-8").split("\n")[:-1]


def _images(name: str, side: int) -> Dataset:
    from datasets import Array2D, ClassLabel, Dataset, Features

    with np.load(io.BytesIO(_read(name))) as arrays:
        images, labels = arrays["x"].reshape(-1, side, side), arrays["y"]
    features = Features(
        {
            "image": Array2D((side, side), "uint8"),
            "label": ClassLabel(names=[str(digit) for digit in range(10)]),
        }
    )
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def load_digits() -> Dataset:
    """Load the 1,797 handwritten digits of the UCI test part.

    Columns: ``image`` (8, 8) of integers from 0 to 16, ``label`` from 0 to 9.

    Examples:
        >>> load_digits().features["label"].num_classes
        10
    """
    return _images("digits.npz", side=8)


def load_mnist5k() -> Dataset:
    """Load 5,000 MNIST digits, 500 of each class, sorted by class: shuffle them.

    They are a fourteenth of MNIST; an accuracy on them is not an accuracy on MNIST.

    Columns: ``image`` (28, 28) of integers from 0 to 255, ``label`` from 0 to 9.

    Examples:
        >>> load_mnist5k().num_rows
        5000
    """
    return _images("mnist5k.npz", side=28)


def load_shakespeare() -> Dataset:
    """Load the 30,911 speeches of Shakespeare's 37 plays, play by play in the order of speaking.

    Columns: ``play``, ``act``, ``scene``, ``role``, ``text`` (verse lines joined by a newline). A role's name is
    unique within its play only.

    Examples:
        >>> load_shakespeare()[0]["play"]
        "A Midsummer Night's Dream"
    """
    from datasets import Dataset, Features, Value

    rows = [json.loads(line) for line in _read_lines("shakespeare.jsonl.xz")]
    features = Features({name: Value("string") for name in ("play", "act", "scene", "role", "text")})
    return Dataset.from_list(rows, features=features)


def load_wikipedia_sample() -> Dataset:
    """Load 106 English Wikipedia articles with 4,812 paragraphs and their 18,624 links.

    Columns: ``title``, ``page_id``, ``revision_id`` and ``paragraphs``, a list of ``section``, ``text`` and
    ``links``, a list of ``start``, ``end`` and ``target``: ``text[start:end]`` links to the article ``target``.

    Examples:
        >>> load_wikipedia_sample()[0]["title"]
        'Anarchism'
    """
    from datasets import Dataset, Features, List, Value

    rows = [json.loads(line) for line in _read_lines("wikipedia-sample.jsonl.xz")]
    for row in rows:
        for paragraph in row["paragraphs"]:
            paragraph["links"] = [
                dict(zip(("start", "end", "target"), link, strict=True)) for link in paragraph["links"]
            ]
    link = {"start": Value("int32"), "end": Value("int32"), "target": Value("string")}
    paragraph = {"section": Value("string"), "text": Value("string"), "links": List(link)}
    features = Features(
        {
            "title": Value("string"),
            "page_id": Value("int64"),
            "revision_id": Value("int64"),
            "paragraphs": List(paragraph),
        }
    )
    return Dataset.from_list(rows, features=features)


def load_wordnet() -> Dataset:
    """Load the 117,659 synsets of WordNet 3.0.

    Columns: ``pos`` (n, v, a, s or r), ``offset`` (of the original database), ``lemmas``, ``hypernyms`` and
    ``instance_hypernyms`` (lists of row numbers of this data set), ``gloss`` (definition and quoted examples).

    Examples:
        >>> load_wordnet()[0]["lemmas"]
        ['entity']
    """
    import pyarrow
    from datasets import Dataset, Features, List, Value

    def numbers(field: str) -> list[int]:
        return [int(number) for number in field.split(",")] if field else []

    convert: dict[str, Callable[[str], Any]] = {
        "pos": str,
        "offset": int,
        "lemmas": lambda field: field.split("|"),
        "hypernyms": numbers,
        "instance_hypernyms": numbers,
        "gloss": str,
    }
    columns = zip(*(line.split("\t") for line in _read_lines("wordnet30.tsv.xz")), strict=True)
    table = {
        name: list(map(function, column)) for (name, function), column in zip(convert.items(), columns, strict=True)
    }
    features = Features(
        {
            "pos": Value("string"),
            "offset": Value("int32"),
            "lemmas": List(Value("string")),
            "hypernyms": List(Value("int32")),
            "instance_hypernyms": List(Value("int32")),
            "gloss": Value("string"),
        }
    )
    # Straight into Arrow: Dataset.from_dict would encode the half million fields one by one, which takes 2 s more.
    return Dataset(pyarrow.Table.from_pydict(table, schema=features.arrow_schema))


def load_wordsim353() -> Dataset:
    """Load WordSim-353: pairs of words and how alike people find them, from 0 to 10.

    Columns: ``word1``, ``word2``, ``similarity``.

    Examples:
        >>> load_wordsim353()[1]
        {'word1': 'tiger', 'word2': 'cat', 'similarity': 7.35}
    """
    from datasets import Dataset, Features, Value

    lines = _read("wordsim353.tsv").decode("utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if line and not line.startswith("#")]
    rows = [{"word1": first, "word2": second, "similarity": float(mean)} for first, second, mean in pairs]
    features = Features({"word1": Value("string"), "word2": Value("string"), "similarity": Value("float64")})
    return Dataset.from_list(rows, features=features)


def read_wordpiece() -> str:
    """Read the uncased WordPiece tokenizer with 8,000 pieces, trained on WordNet's glosses and the Wikipedia sample.

    Returns:
        The JSON that ``tokenizers.Tokenizer.from_str`` takes. Its first five pieces are BERT's special tokens.

    Examples:
        >>> len(json.loads(read_wordpiece())["model"]["vocab"])
        8000
    """
    return _read("wordpiece-8k.json").decode("utf-8")
