import itertools

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from lightning_iclr.pmi_masking.packing import Packer, attention_mask_of, positions_of

BEGIN, END, PADDING = 1, 2, 0


def random_texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 30, length).tolist() for length in lengths]


def packed(texts, length=12, **options):
    parts = list(Packer(length, BEGIN, END, PADDING).pack(texts, **options))
    return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([documents for _, documents in parts])


def pieces(tokens, documents):
    """Each piece's tokens, in order."""
    for row, numbers in zip(tokens, documents, strict=True):
        for number in range(numbers.max() + 1):
            yield row[numbers == number].tolist()


@pytest.mark.parametrize("rows_at_once", [1, 3, 4096])
def test_a_text_that_fits_a_row_is_whole_and_a_longer_one_is_cut_without_loss(rows_at_once):
    texts = random_texts(np.random.default_rng(1).integers(1, 40, 200))
    tokens, documents = packed(texts, rows_at_once=rows_at_once)
    found = list(pieces(tokens, documents))
    assert all(piece[0] == BEGIN and piece[-1] == END for piece in found)
    place = 0
    for text in texts:
        own = []
        while len(own) < len(text):
            own += found[place][1:-1]
            place += 1
            if len(text) + 2 <= 12:
                break
        assert own == text
    assert place == len(found)
    assert ((documents < 0) == (tokens == PADDING)).all()


def test_only_a_row_whose_rest_is_too_short_for_the_next_text_has_padding():
    texts = random_texts(np.random.default_rng(2).integers(1, 11, 300))
    tokens, documents = packed(texts)
    left = (documents < 0).sum(axis=1)
    next_length = [len(next(pieces(tokens[row : row + 1], documents[row : row + 1]))) for row in range(1, len(tokens))]
    assert all(room < length for room, length in zip(left[:-1], next_length, strict=True))


def test_long_texts_leave_no_room_unused():
    _, documents = packed(random_texts([100, 57, 200]))
    assert (documents[:-1] < 0).sum() <= 2 * 2  # a rest below three tokens holds no piece


def test_texts_without_tokens_are_passed_over():
    tokens, documents = packed([[], [5], [], [6]])
    assert list(pieces(tokens, documents)) == [[BEGIN, 5, END], [BEGIN, 6, END]]


def test_a_row_must_hold_a_token():
    with pytest.raises(ValueError, match="length must be at least 3, .* got 2"):
        Packer(2, BEGIN, END, PADDING)


def test_positions_begin_anew_in_each_text():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1]])
    expected = [[*range(3), *range(2), *range(1), *range(2)]]
    assert positions_of(documents).tolist() == expected


def test_tokens_attend_to_their_own_text_alone():
    documents = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1]])
    mask = attention_mask_of(documents)
    assert mask.shape == (2, 1, 4, 4)
    for row, i, j in itertools.product(range(2), range(4), range(4)):
        assert mask[row, 0, i, j] == (documents[row, i] == documents[row, j])


def test_a_packed_text_gets_the_outputs_that_it_gets_alone():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    net = BertForMaskedLM(config).eval()
    texts = random_texts([3, 2, 4, 6, 1, 5])
    tokens, documents = (torch.from_numpy(array).long() for array in packed(texts, length=14))
    with torch.no_grad():
        together = net(
            input_ids=tokens, attention_mask=attention_mask_of(documents), position_ids=positions_of(documents)
        ).logits
        alone = [net(input_ids=torch.tensor([[BEGIN, *text, END]])).logits[0] for text in texts]
    found = [
        together[row][documents[row] == number]
        for row in range(len(tokens))
        for number in range(documents[row].max() + 1)
    ]
    for own, other in zip(alone, found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)
