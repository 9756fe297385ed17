# ruff: noqa: RUF001  (letters and quotation marks that look like others are what these texts are for)
"""Words: how texts are split and numbered, and that tokens of any tokenizer spell the same words."""

import numpy as np
import pytest
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BasicTokenizer

from lightning_iclr.pmi_masking.hashing import hash_words
from lightning_iclr.pmi_masking.words import TokenWords, WordIds, WordSplitter, is_punctuation
from tests.pmi_masking.toys import KINDS, make_tokenizer, paragraphs

HARD = [
    "Hello, World! The end.",
    "don't (e.g. U.S.A.) 50%-60% [x] $5.00 a/b",
    "“Curly” quotes — dashes… ‘single’ «angle» ¿qué?",
    "Café CAFÉ cafe\u0301s re\u0301sume\u0301 Ångström naïve São ZÜRICH ǅ",
    "北京大学的学生 and 日本語テキスト, 한국어 말",
    "ΑΘΗΝΑ Ελλάδα, Москва МОСКВА. العربية עברית हिन्दी ไทย",
    "a\nb\n\nc\td  e\u00a0f\u3000g",
    "co\xadoperate zero\u200bwidth \ufeffmark\u0301",
    "\U0001f600 smile\U0001f600s \U0001d518",
    " leading and trailing ",
    "ﬁne ½ № ² Ⅷ ａｂｃ",
    ".", "...", "é", "中", "", " ", "\n",
]  # fmt: skip


def test_splitting_equals_the_basic_tokenizer_of_bert():
    # transformers' own, in Python, which the one in Rust is a port of.
    basic = BasicTokenizer(do_lower_case=True)
    splitter = WordSplitter()
    for text in [*paragraphs()[:300], "São Paulo's café.", "中文 words"]:
        assert splitter.split(text) == basic.tokenize(text)


def test_case_and_accents_are_kept_where_they_are_wanted():
    text = "São PAULO, 中文"
    assert WordSplitter(lowercase=False).split(text) == ["Sao", "PAULO", ",", "中", "文"]
    assert WordSplitter(strip_accents=False).split(text) == ["são", "paulo", ",", "中", "文"]
    assert WordSplitter(lowercase=False, strip_accents=False).split(text) == ["São", "PAULO", ",", "中", "文"]


def test_punctuation_is_what_splits_words_in_bert_whatever_the_character():
    splitter = BertPreTokenizer()
    plane = [chr(number) for number in range(1, 0x3100) if not chr(number).isspace()]
    assert [c for c in plane if is_punctuation(c) != (len(splitter.pre_tokenize_str(f"a{c}b")) == 3)] == []
    assert [c for c in map(chr, range(33, 127)) if is_punctuation(c)] == list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    assert not any(map(is_punctuation, ["", "a", "..", "中", "é", " "]))


def test_words_are_numbered_as_they_first_occur_and_punctuation_breaks():
    ids = WordIds(WordSplitter())
    assert ids.encode("The cat, the CAT's tail.").tolist() == [0, 1, -1, 0, 1, -1, 2, 3, -1]
    assert ids.encode("tail of").tolist() == [3, 4]
    assert ids.encode("").tolist() == ids.encode(" \n").tolist() == []
    assert ids.words == ["the", "cat", "s", "tail", "of"]
    assert ids.encode("").dtype == ids.encode("the").dtype == np.int32


def test_punctuation_that_is_kept_has_numbers():
    ids = WordIds(WordSplitter(), punctuation="keep")
    assert ids.encode("a, b, c").tolist() == [0, 1, 2, 1, 3]
    assert ids.words == ["a", ",", "b", "c"]


def test_repeated_documents_are_left_out():
    ids = WordIds(WordSplitter(), deduplicate="document")
    encoded = [array.tolist() for array in ids.encode_all(["a b\nc", "a  b c ", "A b c"])]
    assert encoded == [[0, 1, 2], [], [0, 1, 2]]  # white space does not tell documents apart, case does
    assert ids.repeated == 1


def test_repeated_paragraphs_leave_a_gap():
    ids = WordIds(WordSplitter(), deduplicate="paragraph")
    assert ids.encode("a b\n\nc").tolist() == [0, 1, 2]
    assert ids.encode("d\na b\n d \ne").tolist() == [3, -1, -1, 4]
    assert ids.encode("\n \n").tolist() == []
    assert ids.repeated == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(punctuation="drop"), "punctuation must be 'break' or 'keep', got 'drop'"),
        (dict(deduplicate="line"), "deduplicate must be 'paragraph', 'document' or None, got 'line'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WordIds(WordSplitter(), **settings)


def test_a_text_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match="texts must be strings, got bytes"):
        WordIds(WordSplitter()).encode(b"bytes")


def runs_of_known(tokenizer, ids):
    """Yield the tokens between unknown ones, which spell nothing."""
    run = []
    for number in [*ids, tokenizer.unk_token_id]:
        if number != tokenizer.unk_token_id:
            run.append(number)
        elif run:
            yield run
            run = []


SPLITTERS = [WordSplitter(), WordSplitter(lowercase=False, strip_accents=False)]


@pytest.mark.parametrize("splitter", SPLITTERS, ids=["uncased", "cased"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_spell_the_words_of_the_decoded_text(kind, splitter):
    tokenizer = make_tokenizer(kind)
    tokens = TokenWords(tokenizer, splitter)
    spelt = 0
    for text in [*HARD, *paragraphs()[400:700]]:
        for run in runs_of_known(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]):
            words = splitter.split(tokenizer.decode(run))
            found = tokens.read(np.array([run]), np.ones((1, len(run)), bool))
            assert found.hashes.tolist() == hash_words(words).tolist(), (text, words)
            spelt += len(words)
    assert spelt > 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_words_tokens_spell_it(kind):
    tokenizer = make_tokenizer(kind)
    splitter = WordSplitter()
    tokens = TokenWords(tokenizer, splitter)
    for text in [*HARD, *paragraphs()[400:430]]:
        for run in runs_of_known(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]):
            found = tokens.read(np.array([run]), np.ones((1, len(run)), bool))
            words = splitter.split(tokenizer.decode(run))
            for word, first, last in zip(words, found.first, found.last, strict=True):
                piece = tokenizer.decode(run[first : last + 1])
                assert word in splitter.split(piece) or "\ufffd" in piece  # it may share a token with half a character
            assert (np.diff(found.first) >= 0).all()
            assert (found.last >= found.first).all()


@pytest.mark.parametrize("kind", KINDS)
def test_units_begin_where_words_begin_unless_a_token_holds_several(kind):
    tokenizer = make_tokenizer(kind)
    tokens = TokenWords(tokenizer, WordSplitter())
    for text in [*HARD, *paragraphs()[400:500]]:
        for run in runs_of_known(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]):
            found = tokens.read(np.array([run]), np.ones((1, len(run)), bool))
            assert found.unit_begins[0]
            shared = np.zeros(len(found.first), bool)  # whether a word begins in the last token of the one before
            shared[1:] = found.first[1:] == found.last[:-1]
            unit = np.cumsum(found.unit_begins)
            apart = np.diff(unit[found.first], prepend=0) > 0
            assert (apart | shared)[1:].all()
            assert (unit[found.first] == unit[found.last]).all()


def test_a_word_cut_in_mid_character_is_put_together():
    tokenizer = make_tokenizer("byte_bpe")
    tokens = TokenWords(tokenizer, WordSplitter())
    ids = tokenizer("Ḫattuša 北京, “ok”", add_special_tokens=False)["input_ids"]
    spelt = [tokenizer.decode([number]) for number in ids]
    assert sum("\ufffd" in piece for piece in spelt) >= 6  # Ḫ, 北, 京 at least
    found = tokens.read(np.array([ids]), np.ones((1, len(ids)), bool))
    assert found.hashes.tolist() == hash_words(["hattusa", "北", "京", ",", "“", "ok", "”"]).tolist()
    assert found.unit_begins.sum() == 7


def test_half_a_character_at_the_end_of_a_row_is_no_word_and_harms_none():
    tokenizer = make_tokenizer("byte_bpe")
    tokens = TokenWords(tokenizer, WordSplitter())
    ids = tokenizer("ok 北", add_special_tokens=False)["input_ids"]
    found = tokens.read(np.array([ids[:-1]]), np.ones((1, len(ids) - 1), bool))
    assert found.hashes.tolist() == hash_words(["ok"]).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_specials_and_documents_part_words(kind):
    tokenizer = make_tokenizer(kind)
    tokens = TokenWords(tokenizer, WordSplitter())
    ids = tokenizer("philistinesque", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    whole = hash_words(["philistinesque"]).tolist()
    row = np.array([ids])
    yes = np.ones(row.shape, bool)
    assert tokens.read(row, yes).hashes.tolist() == whole
    begins = hash_words(WordSplitter().split(tokenizer.decode(ids[:1])))[0]

    two_rows = tokens.read(np.array([ids[:1], ids[1:2]]), np.ones((2, 1), bool))
    documents = tokens.read(row[:, :2], yes[:, :2], np.array([[4, 5]]))
    cls = np.array([[ids[0], tokenizer.cls_token_id, ids[1]]])
    special = tokens.read(cls, ~tokens.special[cls])
    for found in (two_rows, documents, special):
        assert found.hashes[0] == begins
        assert len(found.hashes) == 2
        assert not found.adjacent.any()
        assert found.unit_begins.all()
    together = tokens.read(row[:, :2], yes[:, :2], np.array([[4, 4]]))
    assert len(together.hashes) == 1
    assert special.place.tolist() == [0, 2]


def test_no_token_has_no_words():
    tokens = TokenWords(make_tokenizer("wordpiece"), WordSplitter())
    for shape in ((0, 5), (2, 5), (2, 0)):
        found = tokens.read(np.zeros(shape, int), np.zeros(shape, bool))
        assert len(found.place) == len(found.hashes) == len(found.first) == len(found.last) == 0


def test_spellings_of_cut_words_are_forgotten_when_they_are_many(monkeypatch):
    monkeypatch.setattr("lightning_iclr.pmi_masking.words._SLOW", 2)
    tokenizer = make_tokenizer("byte_bpe")
    tokens = TokenWords(tokenizer, WordSplitter())
    text = "北 京 学 生 北 京"
    ids = np.array([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert tokens.read(ids, np.ones(ids.shape, bool)).hashes.tolist() == hash_words(text.split()).tolist()
    assert len(tokens._slow) <= 2


class SlowTokenizer:
    """A tokenizer without the Rust library, as some of transformers are: pieces with ##."""

    all_special_ids = (0,)
    pieces = ("[PAD]", "new", "##er", "york", ",", "cafe", "##\u0301", "##s", "##\u200b")

    def __len__(self):
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[number] for number in ids]


def test_a_tokenizer_without_a_plan_is_read_as_wordpiece():
    found = TokenWords(SlowTokenizer(), WordSplitter()).read(np.array([[1, 2, 3, 4]]), np.ones((1, 4), bool))
    assert found.hashes.tolist() == hash_words(["newer", "york", ","]).tolist()


@pytest.mark.parametrize("ids", [[5, 6, 7], [1, 8, 2], [5, 6], [4, 8, 3], [6, 3], [6]])
def test_a_token_that_nobody_sees_does_not_part_a_word(ids):
    # An accent or a space without width has no letter; what it stands in goes on after it.
    tokenizer = SlowTokenizer()
    pieces = tokenizer.convert_ids_to_tokens(ids)
    text = "".join(piece[2:] if piece.startswith("##") else f" {piece}" for piece in pieces)
    found = TokenWords(tokenizer, WordSplitter()).read(np.array([ids]), np.ones((1, len(ids)), bool))
    assert found.hashes.tolist() == hash_words(WordSplitter().split(text)).tolist()
