"""Examples of all forms become the same rows, and every other key stays as it was."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from lightning_iclr.pmi_masking.batches import make_rows, to_tensors
from tests.pmi_masking.toys import letters_tokenizer, make_tokenizer

IDS = [[2, 5, 6, 7, 3], [2, 8, 3], [2, 9, 10, 11, 12, 13, 3]]
PADDED = np.array([row + [0] * (7 - len(row)) for row in IDS])


NONE = np.zeros(20, bool)  # special tokens


def rows_of(examples, multiple=None, side="right", seed=0):
    tokenizer = letters_tokenizer()
    special = np.zeros(len(tokenizer), bool)
    special[tokenizer.all_special_ids] = True
    tokenizer.padding_side = side
    try:
        return make_rows(examples, tokenizer, special, seed, multiple)
    finally:
        tokenizer.padding_side = "right"


FORMS = {
    "lists": IDS,
    "mappings of lists": [{"input_ids": row} for row in IDS],
    "mappings of arrays": [{"input_ids": np.array(row, np.int32)} for row in IDS],
    "mappings of tensors": [{"input_ids": torch.tensor(row)} for row in IDS],
    "encodings": [BatchEncoding({"input_ids": row}) for row in IDS],
    "a tuple": tuple({"input_ids": row} for row in IDS),
    "a mapping of lists": {"input_ids": IDS},
    "a padded tensor": {"input_ids": torch.tensor(PADDED)},
    "a padded array": {"input_ids": PADDED},
    "an encoding": BatchEncoding({"input_ids": torch.tensor(PADDED)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_examples_of_any_form_give_the_same_tokens(form):
    rows = rows_of(FORMS[form])
    np.testing.assert_array_equal(rows.tokens, PADDED)
    assert rows.tokens.dtype == np.int64
    np.testing.assert_array_equal(rows.usable, PADDED >= 5)
    if "padded" not in form and form != "an encoding":
        np.testing.assert_array_equal(rows.rest["attention_mask"], PADDED > 0)


def test_padding_is_on_the_tokenizers_side_up_to_a_multiple():
    left = rows_of(IDS, multiple=4, side="left")
    np.testing.assert_array_equal(left.tokens, [[0] * (8 - len(row)) + row for row in IDS])
    np.testing.assert_array_equal(left.usable, left.tokens >= 5)
    right = rows_of(IDS, multiple=4)
    np.testing.assert_array_equal(right.tokens, [row + [0] * (8 - len(row)) for row in IDS])
    assert rows_of(IDS, multiple=7).tokens.shape == (3, 7)


@pytest.mark.parametrize("form", ["lists", "a padded tensor"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_places_that_rows_draw_from_do_not_count_padding_on_the_left(side, form):
    rows = rows_of(FORMS["lists"], multiple=16, side=side)
    if form == "a padded tensor":
        masks = {name: torch.tensor(rows.rest[name]) for name in ("attention_mask",)}
        rows = rows_of({"input_ids": torch.tensor(rows.tokens), **masks}, side=side)
    row, column = rows.at(np.flatnonzero(rows.usable))
    assert row.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert column.tolist() == [1, 2, 3, 1, 1, 2, 3, 4, 5]


def test_tokens_are_not_usable_where_a_mask_says_so():
    examples = [{"input_ids": row, "special_tokens_mask": [0, 1, *[0] * (len(row) - 2)]} for row in IDS]
    rows = rows_of(examples)
    expected = PADDED >= 5
    expected[:, 1] = False
    np.testing.assert_array_equal(rows.usable, expected)
    assert "special_tokens_mask" not in rows.rest
    hidden = rows_of([{"input_ids": row, "attention_mask": [1, 1, *[0] * (len(row) - 2)]} for row in IDS])
    np.testing.assert_array_equal(hidden.usable, (PADDED >= 5) & (np.arange(7) < 2))


def test_every_other_key_is_kept():
    examples = [
        {
            "input_ids": row,
            "weights": [0.5 * number for number in row],
            "mixed": [1] + [0.25] * (len(row) - 1),
            "flags": [number > 6 for number in row],
            "offset_mapping": [(number, number + 1) for number in row],
            "pieces": [str(number) for number in row],
            "token_type_ids": [1] * len(row),
            "document_ids": [number // 4 for number in range(len(row))],
            "bias": np.eye(len(row)),
            "label": number,
            "score": 1.5 * number,
            "text": f"text {number}",
            "picture": np.full((2, 3), number, np.float32),
            "ragged": list(range(number + 1)),
        }
        for number, row in enumerate(IDS)
    ]
    batch = to_tensors(rows_of(examples).rest)
    real = torch.tensor(PADDED > 0)
    torch.testing.assert_close(batch["weights"], torch.tensor(PADDED * 0.5))
    torch.testing.assert_close(batch["mixed"], torch.where(torch.arange(7) == 0, 1.0, 0.25).double() * real)
    assert batch["flags"].tolist() == (PADDED > 6).tolist()
    assert batch["flags"].dtype == torch.bool
    torch.testing.assert_close(
        batch["offset_mapping"], torch.tensor(np.stack([PADDED, PADDED + 1], axis=2)) * real[..., None]
    )
    assert batch["pieces"] == [[str(number) for number in row] for row in IDS]
    torch.testing.assert_close(batch["token_type_ids"], real.long())
    torch.testing.assert_close(batch["document_ids"], torch.arange(7)[None] // 4 * real)
    assert [each.shape for each in batch["bias"]] == [(5, 5), (3, 3), (7, 7)]
    assert batch["label"].tolist() == [0, 1, 2]
    assert batch["score"].tolist() == [0.0, 1.5, 3.0]
    assert batch["text"] == ["text 0", "text 1", "text 2"]
    assert batch["picture"].shape == (3, 2, 3)
    assert batch["picture"].dtype == torch.float32
    assert batch["ragged"] == [[0], [0, 1], [0, 1, 2]]
    assert set(batch) == set(examples[0]) - {"input_ids"} | {"attention_mask"}


def test_columns_that_are_padded_already_are_widened_with_the_tokens():
    rows = rows_of(
        {"input_ids": torch.tensor(PADDED), "attention_mask": torch.tensor(PADDED > 0), "label": torch.arange(3)},
        multiple=8,
    )
    np.testing.assert_array_equal(rows.tokens, np.pad(PADDED, ((0, 0), (0, 1))))
    np.testing.assert_array_equal(rows.rest["attention_mask"], np.pad(PADDED > 0, ((0, 0), (0, 1))))
    np.testing.assert_array_equal(rows.usable, np.pad(PADDED >= 5, ((0, 0), (0, 1))))
    assert rows.rest["label"].tolist() == [0, 1, 2]


class Padding:
    """What a tokenizer says about padding."""

    padding_side, pad_token_id, pad_token_type_id = "right", None, 3


def test_token_types_are_padded_with_the_tokenizers_own():
    rows = make_rows([{"input_ids": row, "token_type_ids": [1] * len(row)} for row in IDS], Padding(), NONE, 0, None)
    np.testing.assert_array_equal(rows.rest["token_type_ids"], np.where(PADDED > 0, 1, 3))


def test_the_input_is_left_alone():
    tensor = torch.tensor(PADDED)
    rows = rows_of({"input_ids": tensor})
    rows.tokens[:] = 99
    np.testing.assert_array_equal(tensor, PADDED)


def test_row_ids_and_epochs_are_used_up():
    rows = rows_of([{"input_ids": row, "row_id": torch.tensor(number), "epoch": 2} for number, row in enumerate(IDS)])
    assert set(rows.rest) == {"attention_mask"}
    assert rows.epochs.tolist() == [2, 2, 2]
    other = rows_of([{"input_ids": IDS[1], "row_id": 1, "epoch": 2}])
    assert other.draws.keys[0] == rows.draws.keys[1]
    first = rows_of([{"input_ids": IDS[1], "row_id": 1, "epoch": 0}])
    assert rows_of([{"input_ids": IDS[1], "row_id": 1}]).draws.keys == first.draws.keys != other.draws.keys


def test_rows_without_a_number_draw_from_torchs_generator():
    torch.manual_seed(5)
    first, second = rows_of(IDS).draws.keys, rows_of(IDS).draws.keys
    torch.manual_seed(5)
    np.testing.assert_array_equal(rows_of(IDS).draws.keys, first)
    assert len({*first.tolist(), *second.tolist()}) == 6


def test_a_tokenizer_without_padding_pads_with_zero():
    rows = make_rows([[5, 6], [7]], Padding(), NONE, 0, None)
    assert rows.tokens.tolist() == [[5, 6], [7, 0]]
    assert rows.usable.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "examples must be at least one, got none"),
        ([{"tokens": [1]}], "examples must have input_ids, got tokens"),
        (
            [{"input_ids": [5], "a": 1}, {"input_ids": [5]}],
            r"the same keys, got \['input_ids', 'a'\] and, at 1, \['input_ids'\]",
        ),
        ([[5, 59]], "input_ids must be this tokenizer's, from 0 to 58, got 5 to 59"),
        ([[-100, 5]], "input_ids must be this tokenizer's, from 0 to 58, got -100 to 5"),
        (
            [{"input_ids": [5, 6], "attention_mask": [1]}, {"input_ids": [5], "attention_mask": [1, 1]}],
            "attention_mask must",
        ),
    ],
)
def test_examples_that_cannot_be_masked_are_refused(examples, message):
    with pytest.raises(ValueError, match=message):
        rows_of(examples)


def test_the_ids_of_a_larger_tokenizer_are_refused():
    ids = make_tokenizer("wordpiece")("some ordinary words")["input_ids"]
    with pytest.raises(ValueError, match="input_ids must be this tokenizer's, from 0 to 58, got"):
        rows_of([ids])
