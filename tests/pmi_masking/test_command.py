import numpy as np
import pytest

from lightning_iclr.__main__ import main
from lightning_iclr.embedded import load_wikipedia_sample
from lightning_iclr.pmi_masking import (
    MaskingVocabulary,
    VocabularySettings,
    naive_pmi_score,
    pmi_score,
)
from lightning_iclr.pmi_masking.command import draw, summary
from tests.pmi_masking.toys import paragraphs

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


def test_several_sources_are_counted_together_and_pictures_are_drawn(corpus, tmp_path, capsys):
    sources = f"[{{dataset: {corpus}, text_column: body}}, {{dataset: {corpus}, text_column: body, join: 3}}]"
    settings = ["--size", 12, "--proportions", "[0.5,0.5]", "--min_count", 2]
    build("--data", sources, "--out", tmp_path / "v.txt", *settings, "--figures", tmp_path / "pictures")
    texts = ["new york city is big", "i love new york city", "old york is small"] * 5
    joined = ["\n".join(texts[at : at + 3]) for at in range(0, 15, 3)]
    expected = MaskingVocabulary.build([*texts, *joined], size=12, proportions=(0.5, 0.5), min_count=2)
    assert (tmp_path / "v.txt").read_text().splitlines() == expected.table["words"].to_pylist()
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {"ranks.png", "coverage.png", "naive_pmi_against_pmi_3.png"}
    assert all(f"drew {tmp_path / 'pictures' / name}" in capsys.readouterr().out for name in list(drawn)[:1])


def test_the_pictures_hold_the_scores_and_the_coverage_of_every_ranking():
    texts = paragraphs()[:100]
    settings = VocabularySettings(size=120, proportions=(0.5, 0.5), min_count=2)
    table, words = settings.count(texts)
    vocabulary = settings.rank(table, words)
    figures = dict(draw(vocabulary, settings, table, words, texts[:50]))
    for axis, n in zip(figures["ranks"].axes, (2, 3), strict=True):
        scores = [row["score"] for row in vocabulary.table.to_pylist() if row["n"] == n]
        assert axis.lines[0].get_ydata().tolist() == scores
    curves = {line.get_label(): line for line in figures["coverage"].axes[0].lines}
    for label, score in (("PMI", "pmi"), ("Naive-PMI", "naive_pmi"), ("frequency", "frequency")):
        for size, share in zip(curves[label].get_xdata(), curves[label].get_ydata(), strict=True):
            built = MaskingVocabulary.build(texts, size=int(size), proportions=(0.5, 0.5), min_count=2, score=score)
            assert share == pytest.approx(100 * built.coverage(texts[:50])["words"])
    assert curves["PMI"].get_xdata()[-1] == 120
    dots = figures["naive_pmi_against_pmi_3"].axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(dots.T, [naive_pmi_score(table, 3), pmi_score(table, 3)])


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
        (["--figures", "/dev/null/figures"], "figures"),
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
