import numpy as np
import pytest
import torch
from tokenizers.processors import BertProcessing, RobertaProcessing
from transformers import BertTokenizerLegacy, PreTrainedTokenizerFast

from lightning_iclr.pmi_masking import load_tokenizer
from lightning_iclr.pmi_masking.pairs import PairEncoder
from tests.pmi_masking.toys import make_tokenizer, names_of_special_tokens

TEXTS = ["What is the capital of Sri Lanka?", "Sri Jayawardenepura Kotte, since 1982."]


def with_processor(kind, processor, **more):
    backend = make_tokenizer(kind).backend_tokenizer
    copied = type(backend).from_str(backend.to_str())
    copied.post_processor = processor
    return PreTrainedTokenizerFast(tokenizer_object=copied, **names_of_special_tokens(), **more)


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_processor("wordpiece", BertProcessing(("[SEP]", 3), ("[CLS]", 2))),
        with_processor("byte_bpe", RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))),
        with_processor("unigram", BertProcessing(("[SEP]", 3), ("[CLS]", 2)), padding_side="left"),
    ],
    ids=["wordpiece", "byte_bpe", "unigram"],
)
@pytest.mark.parametrize("number", [1, 2])
def test_joined_texts_are_those_of_the_tokenizer(tokenizer, number):
    encoder, texts = PairEncoder(tokenizer), TEXTS[:number]
    ids, types = encoder.join(*(tokens.ids for tokens in encoder.encode(texts)))
    theirs = tokenizer(*texts, return_token_type_ids=True)
    assert ids.tolist() == theirs["input_ids"]
    assert types.tolist() == theirs["token_type_ids"]
    assert encoder.specials(pair=number == 2) == tokenizer.num_special_tokens_to_add(pair=number == 2)
    padded = encoder.inputs([encoder.join(tokens.ids) for tokens in encoder.encode(TEXTS)])
    expected = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(padded["input_ids"], expected["input_ids"])
    assert torch.equal(padded["attention_mask"], expected["attention_mask"])


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "unigram", "byte_fallback"])
def test_a_tokenizer_without_special_tokens_of_its_own_writes_berts(kind):
    tokenizer = make_tokenizer(kind)
    encoder = PairEncoder(tokenizer)
    first, second = (tokens.ids for tokens in encoder.encode(TEXTS))
    ids, types = encoder.join(first, second)
    assert ids.tolist() == [2, *first.tolist(), 3, *second.tolist(), 3]
    assert types.tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert tokenizer(TEXTS[0])["input_ids"] == first.tolist()  # the given one is as it was


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "unigram", "byte_fallback"])
def test_offsets_are_characters_of_the_text_as_given(kind):
    encoder, text = PairEncoder(make_tokenizer(kind)), "Zürich\tis  the  largest city (of Switzerland)."
    (tokens,) = encoder.encode([text])
    places = dict.fromkeys(map(tuple, tokens.offsets.tolist()))  # bytes of one character share its place
    pieces = [text[begin:end].strip() for begin, end in places]
    assert "".join(pieces).replace(" ", "") == "".join(text.split())
    assert np.all(np.diff(tokens.offsets[:, 0]) >= 0)


def test_a_slow_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    with pytest.raises(
        ValueError, match="tokenizer must be a fast one.*, got BertTokenizerLegacy; transformers converts"
    ):
        PairEncoder(BertTokenizerLegacy(str(tmp_path / "vocab.txt")))


def test_a_tokenizer_that_cannot_join_texts_is_refused():
    backend = make_tokenizer("unigram").backend_tokenizer
    own = type(backend).from_str(backend.to_str())
    own.add_tokens(["<extra_id_0>"])
    t5 = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", eos_token="[SEP]")
    with pytest.raises(ValueError, match="tokenizer must have a cls_token to join texts with"):
        PairEncoder(t5)


def test_the_embedded_tokenizer_knows_two_texts():
    encoder = PairEncoder("embedded")
    assert encoder.tokenizer.get_vocab() == load_tokenizer("embedded").get_vocab()
    assert encoder.begin_of_second(4) == 6
