"""Masking vocabularies: which n-grams they take, their files, and how much of a text they cover."""

import pickle
from collections import Counter
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerFast

from lightning_iclr.pmi_masking.spelling import unknown_id, unspellable
from lightning_iclr.pmi_masking.vocabulary import MaskingVocabulary
from lightning_iclr.pmi_masking.words import WordSplitter, is_punctuation
from tests.pmi_masking.toys import KINDS, SlowScores, count_by_hand, list_of, make_tokenizer, paragraphs

PROPORTIONS = (0.8, 0.18, 0.015, 0.005)  # the longest are rare in so short a text


@cache
def texts():
    return paragraphs()[1000:2000]


@cache
def vocabulary():
    return MaskingVocabulary.build(texts(), size=4000, min_count=3, proportions=PROPORTIONS)


@cache
def slow():
    """Count by hand the n-grams of the texts, as words, where punctuation breaks them."""
    words, documents = {}, []
    for text in texts():
        split = WordSplitter().split(text)
        numbers = [-1 if is_punctuation(word) else words.setdefault(word, len(words)) for word in split]
        documents.append(np.array(numbers, np.int64))
    spelt = list(words)
    return SlowScores(
        [
            Counter({tuple(spelt[number] for number in key): count for key, count in level.items()})
            for level in count_by_hand(documents, max_n=5)
        ]
    )


def rows(table, n):
    return [row for row in table.to_pylist() if row["n"] == n]


SCORES = {
    "pmi": lambda words, weight: slow().pmi(words, weight),
    "naive_pmi": lambda words, weight: slow().naive_pmi(words, weight),
    "frequency": lambda words, weight: slow().counts[len(words) - 1][words],
}


@pytest.mark.parametrize("weight", [1.0, 2.0])
@pytest.mark.parametrize("score", SCORES)
def test_a_vocabulary_holds_the_best_of_each_length_by_a_slow_ranking(score, weight):
    built = MaskingVocabulary.build(texts(), size=80, min_count=3, score=score, count_weight=weight)
    for n, quota in ((2, 40), (3, 20), (4, 10), (5, 10)):
        frequent = [words for words, count in slow().counts[n - 1].items() if count >= 3]
        assert len(frequent) > quota
        ranked = sorted((SCORES[score](words, weight) for words in frequent), reverse=True)[:quota]
        found = rows(built.table, n)
        np.testing.assert_allclose([row["score"] for row in found], ranked, rtol=0, atol=1e-10)
        for row in found:
            words = tuple(row["words"].split(" "))
            assert row["count"] == slow().counts[n - 1][words]
            assert row["score"] == pytest.approx(SCORES[score](words, weight), abs=1e-10)
    assert built.table["n"].to_pylist() == [2] * 40 + [3] * 20 + [4] * 10 + [5] * 10


def test_equal_scores_are_ranked_by_the_order_of_the_words():
    texts = ["b c a d " * 20]
    built = MaskingVocabulary.build(texts, size=3, proportions=[1.0], score="frequency")
    assert built.table["words"].to_pylist() == ["b c", "c a", "a d"]  # words are numbered as they occur


@pytest.mark.parametrize(
    ("size", "proportions", "quotas"),
    [(80, (0.5, 0.25, 0.125, 0.125), [40, 20, 10, 10]), (31, (0.8, 0.2), [25, 6]), (30, (0.0, 1.0), [0, 30])],
)
def test_the_size_is_shared_out_by_the_proportions(size, proportions, quotas):
    built = MaskingVocabulary.build(texts(), size=size, proportions=proportions, min_count=3)
    assert len(built) == sum(quotas)
    assert [len(rows(built.table, n)) for n in range(2, len(quotas) + 2)] == quotas


def test_a_length_with_too_few_ngrams_gives_all_it_has_and_no_other_is_refilled():
    text = "a b c d e . " * 11 + "f g . h i . " * 11
    with pytest.warns(UserWarning, match="only 2 n-grams of 4 words are frequent, and 3 were wanted"):
        built = MaskingVocabulary.build([text], size=9, proportions=(1 / 3, 1 / 3, 1 / 3))
    assert [len(rows(built.table, n)) for n in (2, 3, 4)] == [3, 3, 2]


def test_an_ngram_occurs_more_than_ten_times_by_default():
    text = "a b . " * 11 + "c d . " * 10
    with pytest.warns(UserWarning, match="only 1 n-grams of 2 words are frequent"):
        built = MaskingVocabulary.build([text], proportions=[1.0])
    assert built.table["words"].to_pylist() == ["a b"]


@pytest.mark.filterwarnings("ignore:only")
def test_ngrams_neither_cross_documents_nor_punctuation():
    built = MaskingVocabulary.build(["a b, c d"] * 20, size=100, proportions=[1.0], min_count=1)
    assert sorted(built.table["words"].to_pylist()) == ["a b", "c d"]


@pytest.mark.filterwarnings("ignore:only")
def test_punctuation_can_be_kept_as_a_word():
    built = MaskingVocabulary.build(["A b, c"] * 20, size=100, proportions=[1.0], punctuation="keep", lowercase=False)
    assert sorted(built.table["words"].to_pylist()) == [", c", "A b", "b ,"]
    assert "A b" in built
    assert "b," in built
    assert "a b" not in built


@pytest.mark.filterwarnings("ignore:only")
@pytest.mark.parametrize(("deduplicate", "counts"), [(None, [42, 28]), ("paragraph", [1]), ("document", [3, 2])])
def test_repeated_paragraphs_or_documents_are_left_out(deduplicate, counts):
    texts = ["new york\nnew york\n \nnew  york"] * 14
    built = MaskingVocabulary.build(texts, proportions=[1.0], min_count=1, deduplicate=deduplicate)
    assert sorted(built.table["count"].to_pylist(), reverse=True) == counts  # new york, and york new between lines


@pytest.mark.parametrize("engine", ["duckdb", "daft"])
def test_engines_and_memory_do_not_change_a_vocabulary(engine, tmp_path):
    other = MaskingVocabulary.build(
        iter(texts()),
        size=4000,
        min_count=3,
        proportions=PROPORTIONS,
        engine=engine,
        memory_limit="100MB",
        spill_dir=tmp_path / "spill",
    )
    assert other.table.equals(vocabulary().table)


def test_ngrams_are_members_however_they_are_written():
    built = vocabulary()
    entries = built.table["words"].to_pylist()
    known = set(entries)
    assert all(entry in built for entry in entries[::5])
    assert "united states" in built
    assert "  United\tSTÁTES\n" in built
    assert "united, states" not in built
    assert "unitedstates" not in built
    assert "states united" not in built
    assert "united" not in built
    assert "" not in built
    assert ("united", "states") not in built
    absent = [words for words in slow().counts[1] if " ".join(words) not in known]
    assert not any(" ".join(words) in built for words in absent[:1000])


def test_the_released_lists_format_is_written_and_read(tmp_path):
    vocabulary().save(tmp_path / "lists" / "pmi.txt")
    lines = (tmp_path / "lists" / "pmi.txt").read_bytes().decode().split("\n")
    assert lines == [*vocabulary().table["words"].to_pylist(), ""]
    read = MaskingVocabulary.from_file(tmp_path / "lists" / "pmi.txt")
    assert read.table.select(["words", "n"]).equals(vocabulary().table.select(["words", "n"]))
    assert read.table["score"].null_count == read.table["count"].null_count == len(read) == 4000
    assert read.max_n == 5
    assert read.coverage(texts()[:20]) == vocabulary().coverage(texts()[:20])
    assert [path.name for path in (tmp_path / "lists").iterdir()] == ["pmi.txt"]


def test_a_list_with_other_ends_of_lines_and_more_spaces_is_read_as_well(tmp_path):
    (tmp_path / "list.txt").write_bytes("new york\r\n  by\tthe  way \r\n\r\nsão paulo".encode())
    read = MaskingVocabulary.from_file(tmp_path / "list.txt", strip_accents=False, punctuation="keep")
    assert read.table["words"].to_pylist() == ["new york", "by the way", "são paulo"]
    assert read.table["n"].to_pylist() == [2, 3, 2]
    assert "by the way" in read
    assert "São Paulo" in read
    assert "Sao Paulo" not in read
    assert read.punctuation == "keep"


@pytest.mark.filterwarnings("ignore:only")
def test_parquet_keeps_counts_scores_and_settings(tmp_path):
    settings = dict(lowercase=False, strip_accents=False, punctuation="keep")
    built = MaskingVocabulary.build(texts()[:300], size=200, min_count=3, proportions=PROPORTIONS, **settings)
    built.save(tmp_path / "pmi.parquet")
    read = MaskingVocabulary.from_file(str(tmp_path / "pmi.parquet"))
    assert read == built
    assert {name: getattr(read, name) for name in settings} == settings
    assert pq.read_schema(tmp_path / "pmi.parquet").names == ["words", "n", "count", "score"]
    assert [path.name for path in tmp_path.iterdir()] == ["pmi.parquet"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(monkeypatch, tmp_path):
    def fail(*args):
        raise OSError("disk full")

    vocabulary().save(tmp_path / "pmi.parquet")
    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        vocabulary().save(tmp_path / "pmi.parquet")
    assert MaskingVocabulary.from_file(tmp_path / "pmi.parquet") == vocabulary()


def test_a_vocabulary_is_picklable():
    copy = pickle.loads(pickle.dumps(vocabulary()))
    assert copy == vocabulary()
    assert "united states" in copy


def coverage_by_hand(entries, texts):
    """Return the share of words whose longest n-gram is of each length, by looking at every window."""
    longest = Counter()
    total = 0
    for text in texts:
        words = WordSplitter().split(text)
        best = [0] * len(words)
        for n in range(2, 6):
            for begin in range(len(words) - n + 1):
                if " ".join(words[begin : begin + n]) in entries:
                    best[begin : begin + n] = [n] * n
        longest.update(best)
        total += len(words)
    return {f"n={n}": longest[n] / total for n in range(2, 6)}


def test_coverage_equals_a_walk_over_all_windows():
    held_out = paragraphs()[2200:2300]
    expected = coverage_by_hand(set(vocabulary().table["words"].to_pylist()), held_out)
    found = vocabulary().coverage(held_out)
    assert min(expected.values()) > 5e-4
    assert found == pytest.approx({"words": sum(expected.values()), **expected}, abs=1e-12)


def test_coverage_of_known_texts():
    built = list_of("new york", "new york city")
    assert built.coverage(["New York City, new york"]) == pytest.approx({"words": 5 / 6, "n=2": 2 / 6, "n=3": 3 / 6})
    assert built.coverage(["new", "york"]) == {"words": 0, "n=2": 0, "n=3": 0}
    assert built.coverage(["", " "]) == built.coverage([]) == {"words": 0, "n=2": 0, "n=3": 0}


def coverage_through(tokenizer, built, texts):
    """Return the share of words that lie in n-grams, of the words that a tokenizer's tokens spell."""
    matcher = built.compile(tokenizer)
    covered = total = 0
    for text in texts:
        ids = np.array([tokenizer(text, add_special_tokens=False)["input_ids"]])
        words = matcher.tokens.read(ids, ~matcher.tokens.special[ids])
        longest = built.longest(words.hashes, np.cumsum(~words.adjacent)[words.first])
        inside = np.zeros(len(longest) + 1, int)
        np.add.at(inside, np.flatnonzero(longest), 1)
        np.add.at(inside, np.flatnonzero(longest) + longest[longest > 0], -1)
        covered += np.count_nonzero(np.cumsum(inside))
        total += len(longest)
    return covered / total


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_through_any_tokenizer_is_that_of_the_text(kind):
    held_out = paragraphs()[2200:2500]
    share = vocabulary().coverage(held_out)["words"]
    assert share > 0.1
    assert coverage_through(make_tokenizer(kind), vocabulary(), held_out) == pytest.approx(share, abs=0.002)


HARD = [  # no text with any of them is in what the tokenizers were trained on
    "NEW YORK",
    "new york, (new york) new york: «new york»",
    "“New York” — New-York's 'new york'…",
    "São Paulo; SÃO PAULO.",
    "sa\u0303o paulo",
    "北京大学 北京",
    "[by the way]by the way",
]


@pytest.mark.filterwarnings("ignore:1 of 4 n-grams hold words that the tokenizer cannot spell")
@pytest.mark.parametrize("kind", KINDS[:3])
def test_hard_words_are_covered_through_any_tokenizer(kind):
    built = list_of("new york", "sao paulo", "北 京", "by the way")
    tokenizer = make_tokenizer(kind)
    texts = [text for text in HARD if tokenizer.unk_token_id not in tokenizer(text)["input_ids"]]
    assert len(texts) >= (7 if kind == "byte_bpe" else 3)
    assert built.coverage(texts)["words"] > 0.4
    assert coverage_through(tokenizer, built, texts) == pytest.approx(built.coverage(texts)["words"], abs=1e-12)


def test_matches_do_not_cross_an_unknown_word():
    built = list_of("new york")
    tokenizer = make_tokenizer("wordpiece")
    ids = tokenizer("new \U0001f600 york", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id in ids
    assert coverage_through(tokenizer, built, ["new \U0001f600 york"]) == 0


@pytest.mark.parametrize(
    "text", ["new york\U0001f600", "\U0001f600new york", "new york \U0001f600", "\U0001f600 new york"]
)
@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_what_is_left_of_a_word_beside_an_unknown_piece_is_not_taken_for_a_word(kind, text):
    tokenizer = make_tokenizer(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id in ids
    covered = coverage_through(tokenizer, list_of("new york"), [text]) > 0
    assert covered == (list_of("new york").coverage([text])["words"] > 0) == (" \U0001f600" in text or text[1] == " ")


def test_a_border_of_documents_parts_a_word_from_an_unknown_piece():
    tokenizer = make_tokenizer("unigram")
    (ids,) = np.array([tokenizer("new york\U0001f600", add_special_tokens=False)["input_ids"]])[:, None]
    matcher = list_of("new york").compile(tokenizer)
    for documents, hit in ((np.zeros_like(ids), False), (np.arange(ids.size)[None] // (ids.size - 1), True)):
        words = matcher.tokens.read(ids, ~matcher.tokens.special[ids], documents)
        assert (matcher.ends(words)[0] == 1) == hit


def test_ngrams_that_the_tokenizer_cannot_spell_are_counted_and_told_once():
    built = list_of("new york", "new \U0001f600", "\U0001f600\U0001f600 x", "\U0001f600 \U0001f600", "of the")
    for kind in ("wordpiece", "unigram"):
        with pytest.warns(UserWarning, match="cannot spell") as told:
            matcher = built.compile(make_tokenizer(kind))
        assert [str(each.message) for each in told] == [
            "3 of 5 n-grams hold words that the tokenizer cannot spell, such as 'new \U0001f600': no match"
        ]
        assert matcher.skipped == 3
        text = "\U0001f600 \U0001f601"  # two unknown words, which are not the same
        ids = np.array([make_tokenizer(kind)(text, add_special_tokens=False)["input_ids"]])
        words = matcher.tokens.read(ids, ~matcher.tokens.special[ids])
        assert not built.longest(words.hashes, np.zeros(len(words.hashes), int)).any()
    assert built.compile(make_tokenizer("byte_bpe")).skipped == 0


def test_a_word_that_is_spelt_in_one_case_is_not_unknown():
    pieces = ["[PAD]", "[UNK]", "New", "YORK", "city"]
    words = Tokenizer(WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    words.pre_tokenizer = BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")  # which is not told its unknown
    assert unknown_id(tokenizer) == 1
    with pytest.warns(UserWarning, match="1 of 2 n-grams hold words that the tokenizer cannot spell"):
        matcher = list_of("new york", "new town").compile(tokenizer)
    ids = np.array([tokenizer("New YORK town", add_special_tokens=False)["input_ids"]])
    assert matcher.tokens.special[ids].tolist() == [[False, False, True]]
    assert matcher.ends(matcher.tokens.read(ids, ~matcher.tokens.special[ids])).tolist() == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_cannot_spell_what_it_writes_with_its_unknown_token(kind):
    tokenizer = make_tokenizer(kind)
    words = sorted({word for text in texts()[:300] for word in WordSplitter().split(text)})
    cases = (str, str.capitalize, str.upper)
    expected = {
        word
        for word in words
        if all(tokenizer.unk_token_id in tokenizer(case(word), add_special_tokens=False)["input_ids"] for case in cases)
    }
    assert unspellable(tokenizer, words) == expected
    assert (len(expected) > 0) == (kind in ("wordpiece", "unigram"))


def test_ends_of_matches_are_in_groups_of_tokens():
    built = list_of("of the", "the people", "of the people")
    tokenizer = make_tokenizer("wordpiece")
    ids = np.array([tokenizer("philistines of the people.", add_special_tokens=False)["input_ids"]])
    matcher = built.compile(tokenizer)
    words = matcher.tokens.read(ids, np.ones(ids.shape, bool))
    assert len(words.unit_begins) > words.unit_begins.sum() == 5  # the first word has several tokens
    assert matcher.ends(words).tolist() == [0, 3, 3, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(size=0), "size must be at least 1, got 0"),
        (dict(proportions=()), r"proportions must be shares .* that add up to 1, got \[\]"),
        (dict(proportions=(0.5, 0.25)), r"proportions must be shares .* that add up to 1, got \[0.5, 0.25\]"),
        (dict(proportions=(1.5, -0.5)), r"proportions must be shares .* that add up to 1, got \[1.5, -0.5\]"),
        (dict(score="npmi"), "score must be 'pmi', 'naive_pmi' or 'frequency', got 'npmi'"),
        (dict(count_weight=0), "count_weight must be positive, got 0"),
        (dict(count_weight=float("nan")), "count_weight must be positive, got nan"),
        (dict(min_count=0), "min_count must be at least 1, got 0"),
        (dict(engine="spark"), "engine must be 'numpy', 'duckdb' or 'daft', got 'spark'"),
        (dict(memory_limit="-1"), "memory_limit must be a number of bytes"),
        (dict(punctuation="drop"), "punctuation must be 'break' or 'keep', got 'drop'"),
        (dict(deduplicate="word"), "deduplicate must be 'paragraph', 'document' or None, got 'word'"),
    ],
)
def test_wrong_settings_are_refused_before_a_text_is_read(settings, message):
    def texts():
        raise AssertionError("a text was read")
        yield

    with pytest.raises(ValueError, match=message):
        MaskingVocabulary.build(texts(), **settings)


@pytest.mark.filterwarnings("ignore:only")
def test_a_length_without_frequent_ngrams_is_named():
    text = "a b c . " * 20
    with pytest.raises(ValueError, match="no n-gram of 4 words occurs min_count times; lower min_count"):
        MaskingVocabulary.build([text + "a b c x y z"], size=8)


@pytest.mark.parametrize("texts", [[], [""], ["too short, it is"]])
def test_a_corpus_that_is_too_short_is_refused(texts):
    with pytest.raises(ValueError, match="max_n is 5, and no document has so many words in a row"):
        MaskingVocabulary.build(texts, min_count=1)


def test_a_text_that_is_none_is_refused():
    with pytest.raises(TypeError, match="texts must be strings, got NoneType"):
        MaskingVocabulary.build(["a text", None])


FILES = {
    "one.txt": (b"new york\nword\n", "line 2 of .*one.txt must hold an n-gram of two or more words, got 'word'"),
    "empty.txt": (b"\n \n", "a masking vocabulary must have at least one n-gram, got none"),
    "bad.parquet": (b"nonsense", "Parquet"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_vocabulary_are_refused(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MaskingVocabulary.from_file(tmp_path / name)


def test_tables_that_are_no_vocabulary_are_refused(tmp_path):
    pq.write_table(pa.table({"words": ["new york"], "n": [2]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="other.parquet is not a masking vocabulary: it lacks count, score"):
        MaskingVocabulary.from_file(tmp_path / "other.parquet")
    pq.write_table(vocabulary().table, tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="bare.parquet is not a masking vocabulary: it lacks its settings"):
        MaskingVocabulary.from_file(tmp_path / "bare.parquet")


@pytest.mark.parametrize("name", ["missing.txt", "missing.parquet"])
def test_a_missing_file_is_reported(name):
    with pytest.raises(FileNotFoundError, match=name):
        MaskingVocabulary.from_file(name)


def test_pmi_and_frequency_choose_different_ngrams():
    settings = dict(size=300, min_count=3, proportions=[1.0])
    built = [MaskingVocabulary.build(texts()[:400], score=score, **settings) for score in SCORES]
    entries = [set(each.table["words"].to_pylist()) for each in built]
    assert "of the" in built[2]
    assert "of the" not in built[0]
    assert len(entries[0] & entries[2]) < 100
