"""T5's form: input and target together spell the rows, and sentinels stand for whole units."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from transformers import T5TokenizerFast

from lightning_iclr.pmi_masking.collator import PMIMaskingCollator, RandomTokenCollator, WholeWordCollator
from lightning_iclr.pmi_masking.sentinels import find_sentinels
from lightning_iclr.pmi_masking.spans import RandomSpanCollator
from tests.pmi_masking.toys import list_of, make_tokenizer, paragraphs

ENTRIES = ["of the", "in the", "the united states", "prime minister", "such as", "as well as"]
COLLATORS = {
    "token": RandomTokenCollator,
    "word": WholeWordCollator,
    "span": RandomSpanCollator,
    "pmi": lambda tokenizer, **settings: PMIMaskingCollator(tokenizer, list_of(*ENTRIES), **settings),
}


@cache
def t5(sentinels=100):
    model = json.loads(make_tokenizer("unigram").backend_tokenizer.to_str())["model"]
    return T5TokenizerFast(vocab=[tuple(piece) for piece in model["vocab"]], extra_ids=sentinels)


@cache
def rows():
    ids = t5()(paragraphs()[400:520], truncation=True, max_length=100)["input_ids"]
    return [{"input_ids": row, "row_id": number} for number, row in enumerate(ids)]


def spans_of(target, sentinels):
    """Return the tokens after each sentinel of a target, without its padding and its end."""
    tokens = [number for number in target if number != -100]
    assert tokens.pop() == t5().eos_token_id
    spans = []
    for number in tokens:
        if number in sentinels:
            assert number == sentinels[len(spans)]  # in their order
            spans.append([])
        else:
            spans[-1].append(number)
    return spans


def rebuilt(row, mask, target, sentinels):
    """Put the spans of a target into the places of their sentinels."""
    spans = spans_of(target, sentinels)
    assert spans.pop() == []  # the last sentinel ends the target
    assert all(spans)
    found = []
    for number in row[mask]:
        found += spans[sentinels.index(number)] if number in sentinels else [number]
    return found


@pytest.mark.parametrize("probability", [0.15, 0.5])
@pytest.mark.parametrize("name", COLLATORS)
def test_input_and_target_spell_the_rows_exactly(name, probability):
    tokenizer = t5()
    collator = COLLATORS[name](tokenizer, denoising="sentinels", mlm_probability=probability)
    sentinels = find_sentinels(tokenizer).tolist()
    batch = collator(rows())
    masks = batch["attention_mask"].bool().numpy()
    for number, row in enumerate(rows()):
        original = row["input_ids"]
        inputs, target = batch["input_ids"][number].numpy(), batch["labels"][number].tolist()
        assert rebuilt(inputs, masks[number], target, sentinels) == original
        assert (inputs[~masks[number]] == tokenizer.pad_token_id).all()
        assert masks[number].tolist() == sorted(masks[number].tolist(), reverse=True)
        spans = spans_of(target, sentinels)
        taken = sum(map(len, spans))
        usable = len([token for token in original if token not in tokenizer.all_special_ids])
        assert taken == max(1, round(probability * usable))
        kept = inputs[masks[number]]
        at = np.flatnonzero(np.isin(kept, sentinels))
        assert (np.diff(at) > 1).all()  # adjacent spans are one
    assert batch["labels"].dtype == batch["input_ids"].dtype == torch.int64
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("name", COLLATORS)
def test_the_spans_are_the_units_that_masks_would_stand_for(name):
    tokenizer = t5()
    collator = COLLATORS[name](tokenizer, denoising="sentinels")
    sentinels = find_sentinels(tokenizer).tolist()
    batch = collator(rows())
    prepared, selection = collator.plan(rows())
    taken = np.zeros(prepared.tokens.shape, bool)
    taken.reshape(-1)[selection.place] = selection.chosen[selection.unit]
    for number in range(len(rows())):
        runs, previous = [], False
        for token, yes in zip(prepared.tokens[number].tolist(), taken[number].tolist(), strict=True):
            if yes:
                runs[-1:] = [[*runs[-1], token]] if previous else [*runs[-1:], [token]]
            previous = yes
        assert spans_of(batch["labels"][number].tolist(), sentinels)[:-1] == runs
    whole = np.zeros(len(selection.chosen), int)
    np.add.at(whole, selection.unit, taken.reshape(-1)[selection.place])
    assert set(np.flatnonzero(whole)) == set(np.flatnonzero(selection.chosen))  # no unit is cut
    np.testing.assert_array_equal(whole[selection.chosen], np.bincount(selection.unit)[selection.chosen])


def test_an_example_that_can_be_read():
    tokenizer = t5()

    class Fixed(WholeWordCollator):
        def select(self, rows, budgets):
            selection = super().select(rows, budgets)
            selection.chosen[:] = np.isin(np.arange(len(selection.chosen)), [1, 2, 5])
            return selection

    ids = tokenizer("thank you for inviting me to the party")["input_ids"]
    batch = Fixed(tokenizer, denoising="sentinels")([ids])
    read = [
        tokenizer.decode(batch[key][0]).replace("<", " <").replace(">", "> ").split() for key in ("input_ids", "labels")
    ]
    assert " ".join(read[0]) == "thank <extra_id_0> inviting me <extra_id_1> the party </s>"
    assert " ".join(read[1]) == "<extra_id_0> you for <extra_id_1> to <extra_id_2> </s>"


def test_spans_on_the_two_sides_of_a_document_border_are_two():
    ids = t5()("one two", add_special_tokens=False)["input_ids"]
    half = len(t5()("one", add_special_tokens=False)["input_ids"])
    sentinels = find_sentinels(t5()).tolist()
    collator = WholeWordCollator(t5(), denoising="sentinels", mlm_probability=1.0)
    together = collator([{"input_ids": ids, "document_ids": [0] * len(ids)}])
    apart = collator([{"input_ids": ids, "document_ids": [0] * half + [1] * (len(ids) - half)}])
    assert together["input_ids"].tolist() == [sentinels[:1]]
    assert apart["input_ids"].tolist() == [sentinels[:2]]
    assert spans_of(apart["labels"][0].tolist(), sentinels) == [ids[:half], ids[half:], []]
    assert "document_ids" not in apart


def test_keys_that_go_with_the_tokens_are_shortened_with_them():
    ids = rows()[0]["input_ids"]
    example = {"input_ids": ids, "position": list(range(len(ids))), "weight": 2.0, "title": "x", "row_id": 0}
    batch = RandomSpanCollator(t5(), denoising="sentinels")([example])
    kept = batch["position"][0].tolist()
    assert len(kept) == batch["input_ids"].shape[1] == batch["attention_mask"].sum() < len(ids)
    sentinels = find_sentinels(t5()).tolist()
    for place, token in zip(kept, batch["input_ids"][0].tolist(), strict=True):
        assert token in sentinels or ids[place] == token
    assert batch["weight"].tolist() == [2.0]
    assert batch["title"] == ["x"]


def test_padding_on_the_left_gives_the_same_batch():
    left = t5.__wrapped__()  # a tokenizer of its own
    left.padding_side = "left"
    ours = RandomSpanCollator(t5(), denoising="sentinels")(rows())
    theirs = RandomSpanCollator(left, denoising="sentinels")(rows())
    torch.testing.assert_close(theirs, ours)


def test_tokens_are_neither_swapped_nor_kept():
    # With 80/10/10 a tenth of the spans would stand in the input; here none does.
    collator = RandomTokenCollator(t5(), denoising="sentinels", mask_replace_prob=0.0, random_replace_prob=1.0)
    sentinels = find_sentinels(t5()).tolist()
    batch = collator(rows())
    for number, row in enumerate(rows()):
        mask = batch["attention_mask"][number].bool().numpy()
        assert (
            rebuilt(batch["input_ids"][number].numpy(), mask, batch["labels"][number].tolist(), sentinels)
            == row["input_ids"]
        )


def test_a_row_with_more_spans_than_sentinels_is_refused():
    few = t5(sentinels=4)
    collator = RandomTokenCollator(few, denoising="sentinels", mlm_probability=0.5)
    short = few("one two three")["input_ids"]
    with pytest.raises(ValueError, match=r"tokenizer has 4 sentinels, and a row has \d+ spans, which need one more"):
        collator([short, few(paragraphs()[400])["input_ids"]])


@pytest.mark.parametrize(("spans", "fits"), [(3, True), (4, False)])
def test_one_sentinel_is_left_for_the_end(spans, fits):
    class Every(WholeWordCollator):
        def select(self, rows, budgets):
            selection = super().select(rows, budgets)
            selection.chosen[:] = np.arange(len(selection.chosen)) % 2 == 0
            return selection

    collator = Every(t5(sentinels=4), denoising="sentinels")
    ids = t5(sentinels=4)("one of two of three of four of five".rsplit(" ", 2 * (5 - spans))[0])["input_ids"]
    if fits:
        sentinels = find_sentinels(t5(sentinels=4)).tolist()
        assert sorted(set(collator([ids])["labels"][0].tolist()) & set(sentinels)) == sorted(sentinels)
    else:
        with pytest.raises(ValueError, match="tokenizer has 4 sentinels, and a row has 4 spans"):
            collator([ids])


def test_rows_of_special_tokens_only_have_an_empty_target():
    tokenizer = t5()
    batch = RandomSpanCollator(tokenizer, denoising="sentinels")([[tokenizer.eos_token_id], rows()[0]["input_ids"]])
    first = find_sentinels(tokenizer)[0]
    assert [number for number in batch["labels"][0].tolist() if number != -100] == [first, tokenizer.eos_token_id]
    assert batch["input_ids"][0][0] == tokenizer.eos_token_id


def test_sentinels_are_found_in_their_order():
    class Tokenizer:
        def get_vocab(self):
            return {"<extra_id_10>": 3, "<extra_id_2>": 7, "extra_id_1": 1, "<extra_id_0>": 5, "a": 0}

    assert find_sentinels(Tokenizer()).tolist() == [5, 7, 3]


def test_a_tokenizer_without_sentinels_is_refused():
    with pytest.raises(ValueError, match="tokenizer must have sentinels <extra_id_0>, ..., and .* has none"):
        RandomTokenCollator(make_tokenizer("unigram"), denoising="sentinels")
