import pytest

from lightning_iclr.__main__ import main
from lightning_iclr.embedded import load_wikipedia_sample
from lightning_iclr.pmi_masking import MaskingVocabulary
from lightning_iclr.pmi_masking.command import summary

pytestmark = pytest.mark.filterwarnings("ignore:only .* n-grams of .* words are frequent")


@pytest.fixture
def corpus(tmp_path):
    lines = [
        f'{{"body": "{text}"}}' for text in ["new york city is big", "i love new york city", "old york is small"] * 5
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines))
    return path


def build(*arguments):
    main(["pmi-vocabulary", *map(str, arguments)])


def test_the_command_writes_the_vocabulary_that_python_builds_and_shows_its_ends(corpus, tmp_path, capsys):
    out = tmp_path / "found.parquet"
    build(
        "--data",
        corpus,
        "--text_column",
        "body",
        "--out",
        out,
        "--size",
        8,
        "--proportions",
        "[0.5,0.5]",
        "--min_count",
        5,
    )
    texts = ["new york city is big", "i love new york city", "old york is small"] * 5
    expected = MaskingVocabulary.build(texts, size=8, proportions=(0.5, 0.5), min_count=5)
    assert MaskingVocabulary.from_file(out).table.equals(expected.table)
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith("2 ")]
    best = expected.table["words"][0].as_py()
    assert " ".join(rows[0][4:6]) == best
    assert f"wrote {len(expected)} n-grams to {out}" in printed


def test_an_embedded_corpus_is_read_by_its_name(tmp_path):
    out = tmp_path / "wikipedia.txt"
    build("--data", "wikipedia", "--out", out, "--size", 40)
    articles = ["\n".join(part["text"] for part in article["paragraphs"]) for article in load_wikipedia_sample()]
    expected = MaskingVocabulary.build(articles, size=40)
    assert out.read_text().splitlines() == expected.table["words"].to_pylist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "spark"], "engine"),
        (["--out", "nowhere/v.txt"], "out must be a file in a folder that exists, got nowhere/v.txt"),
        (["--text_column", "text"], "text_column='text' is no column"),
        (["--size", "0"], "size must be at least 1, got 0"),
        (["--memory_limit", "much"], "memory_limit must be a number of bytes or a string such as '2GB', got 'much'"),
        (["--data", "no/such/thing"], "no/such/thing"),
    ],
)
def test_what_the_user_got_wrong_is_told_in_a_line(corpus, tmp_path, capsys, arguments, message):
    options = {"--data": corpus, "--out": tmp_path / "v.txt", "--text_column": "body"}
    options |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(SystemExit) as stop:
        build(*[part for pair in options.items() for part in pair])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "v.txt").exists()


def test_a_vocabulary_without_counts_has_a_table_too(tmp_path):
    (tmp_path / "list.txt").write_text("of the\nin the\nout of the\n")
    lines = summary(MaskingVocabulary.from_file(tmp_path / "list.txt")).splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["2", "1", "of", "2"],
        ["2", "2", "of", "2"],
        ["3", "1", "of", "1"],
    ]
