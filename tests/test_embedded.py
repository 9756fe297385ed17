import hashlib
import importlib.resources
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lightning_iclr.embedded as embedded

FOLDER = Path(embedded.__file__).parent
FILES = {
    "shakespeare.jsonl.xz",
    "wordnet30.tsv.xz",
    "wikipedia-sample.jsonl.xz",
    "mnist5k.npz",
    "digits.npz",
    "wordsim353.tsv",
    "wordpiece-8k.json",
}


def test_the_files_are_those_of_the_provenance_note():
    note = (FOLDER / "PROVENANCE.md").read_text()
    checksums = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", note, re.MULTILINE))
    assert set(checksums.values()) == FILES
    assert {path.name for path in FOLDER.iterdir() if path.suffix in {".xz", ".npz", ".tsv", ".json"}} == FILES
    for checksum, name in checksums.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == checksum


@pytest.mark.parametrize(("load", "shape", "top"), [("load_digits", (8, 8), 16), ("load_mnist5k", (28, 28), 255)])
def test_digits_have_their_shape_range_and_classes(load, shape, top):
    data = getattr(embedded, load)()
    assert data.features["image"].shape == shape
    assert data.features["image"].dtype == "uint8"
    assert data.features["label"].names == list("0123456789")
    images = np.asarray(data.with_format("numpy")["image"][:])
    labels = np.asarray(data["label"][:])
    assert images.shape == (len(data), *shape)
    assert (images.min(), images.max()) == (0, top)
    counts = np.bincount(labels, minlength=10).tolist()
    assert counts == ([500] * 10 if load == "load_mnist5k" else [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])


def test_digits_are_those_of_scikit_learn():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    data = embedded.load_digits()
    assert np.array_equal(np.asarray(data.with_format("numpy")["image"][:]), digits.images)
    assert np.array_equal(np.asarray(data["label"][:]), digits.target)


def test_shakespeare_has_its_speeches_plays_and_roles():
    data = embedded.load_shakespeare()
    assert data.column_names == ["play", "act", "scene", "role", "text"]
    assert data.num_rows == 30_911
    assert len(data.unique("play")) == 37
    assert len(set(zip(data["play"], data["role"], strict=True))) == 1380
    assert all(data["text"])


def test_wikipedia_s_links_lie_within_their_paragraphs():
    data = embedded.load_wikipedia_sample()
    paragraphs = [paragraph for article in data for paragraph in article["paragraphs"]]
    links = [(paragraph["text"], link) for paragraph in paragraphs for link in paragraph["links"]]
    assert (data.num_rows, len(paragraphs), len(links)) == (106, 4812, 18_624)
    assert all(0 <= link["start"] < link["end"] <= len(text) for text, link in links)
    assert len({link["target"] for _, link in links}) == 13_905
    same = sum(text[link["start"] : link["end"]].casefold() == link["target"].casefold() for text, link in links)
    assert same / len(links) == pytest.approx(0.657, abs=5e-4)  # offsets count characters, not bytes


def test_wordnet_s_hypernyms_are_rows_of_it():
    data = embedded.load_wordnet()
    assert data.num_rows == 117_659
    assert set(data.unique("pos")) == set("nvasr")
    table = {name: data[name][:] for name in ("lemmas", "hypernyms", "instance_hypernyms")}
    rows = [row for name in ("hypernyms", "instance_hypernyms") for numbers in table[name] for row in numbers]
    assert min(rows) >= 0
    assert max(rows) < data.num_rows
    assert sum(bool(numbers) for numbers in table["instance_hypernyms"]) == 7730
    assert all(all(lemmas) for lemmas in table["lemmas"])
    dog = table["lemmas"].index(["dog", "domestic dog", "Canis familiaris"])
    assert ["canine", "canid"] in [table["lemmas"][row] for row in table["hypernyms"][dog]]
    assert data[dog]["offset"] == 2084071  # of the noun database of WordNet 3.0


def test_wordsim_has_353_pairs():
    data = embedded.load_wordsim353()
    assert data.num_rows == 353
    assert {"word1": "tiger", "word2": "tiger", "similarity": 10.0} in data.to_list()
    assert all(0 <= value <= 10 for value in data["similarity"])


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Let the loaders read a copy of the files."""
    folder = shutil.copytree(FOLDER, tmp_path / "files")
    monkeypatch.setattr(embedded, "files", lambda package: folder)
    return folder


@pytest.mark.parametrize(
    ("name", "load"),
    [("digits.npz", embedded.load_digits), ("wordnet30.tsv.xz", embedded.load_wordnet)],
)
@pytest.mark.parametrize("damage", ["changed", "truncated"])
def test_a_damaged_file_is_named_with_both_checksums(copied, name, load, damage):
    content = bytearray((copied / name).read_bytes())
    expected = hashlib.sha256(content).hexdigest()
    if damage == "changed":
        content[1000] ^= 1
    else:
        del content[-1000:]
    (copied / name).write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=f"{re.escape(name)} is damaged: .*{expected} and is {found}"):
        load()


def test_a_python_without_lzma_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(ImportError, match=r"shakespeare\.jsonl\.xz needs Python's lzma module"):
        embedded.load_shakespeare()
    assert embedded.load_wordsim353().num_rows == 353


def test_the_files_are_read_from_a_zip_on_the_import_path(tmp_path):
    (tmp_path / "package").mkdir()
    package = tmp_path / "package" / "lightning_iclr"
    shutil.copytree(FOLDER, package / "embedded", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    archive = shutil.make_archive(str(tmp_path / "package"), "zip", tmp_path / "package")
    # A stand-in for datasets, whose import would take most of the test's time.
    program = """
import sys, types
sys.path.insert(0, sys.argv[1])
stub = types.ModuleType("datasets")
stub.Features = stub.Value = stub.Dataset = lambda *args: args
stub.Dataset.from_list = lambda rows, features: rows
sys.modules["datasets"] = stub
import lightning_iclr.embedded as embedded
assert sys.argv[1] in embedded.__file__, embedded.__file__
print(len(embedded.load_wordsim353()), len(embedded.load_shakespeare()))
"""
    command = [sys.executable, "-c", program, archive]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["353", "30911"], result.stderr


def test_importing_the_loaders_does_not_import_datasets():
    program = "import sys, lightning_iclr.embedded; print('datasets' in sys.modules)"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parents[1])
    assert result.stdout.split() == ["False"], result.stderr


def test_the_provenance_note_is_a_resource_of_the_package():
    assert (
        "WordNet 3.0 licence"
        in importlib.resources.files("lightning_iclr.embedded").joinpath("PROVENANCE.md").read_text()
    )
