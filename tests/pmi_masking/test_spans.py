"""Random spans: the distribution of their lengths, where they begin, and how the last one ends."""

import numpy as np
import pytest
from scipy import stats

from lightning_iclr.pmi_masking.spans import RandomSpanCollator, span_lengths
from tests.pmi_masking.test_collator import articles, examples, units_of, words_by_hand
from tests.pmi_masking.toys import letters_tokenizer, make_tokenizer

GRID = (np.arange(10**6) + 0.5) / 10**6


def ids_of(text):
    return letters_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("beyond", "mean"), [("truncate", 3.797), ("clip", 4.463)])
def test_lengths_are_geometric_up_to_ten(beyond, mean):
    lengths = span_lengths(np.random.default_rng(0).random(100_000), 0.2, 10, beyond)
    shares = 0.2 * 0.8 ** np.arange(10)
    if beyond == "clip":
        shares[-1] += 1 - shares.sum()
    counts = np.bincount(lengths, minlength=11)[1:]
    assert len(counts) == 10
    assert stats.chisquare(counts, shares / shares.sum() * 100_000).pvalue > 1e-3
    assert span_lengths(GRID, 0.2, 10, beyond).mean() == pytest.approx(mean, abs=5e-4)


@pytest.mark.parametrize("beyond", ["truncate", "clip"])
def test_lengths_at_the_ends_of_their_range(beyond):
    assert set(span_lengths(GRID, 1.0, 10, beyond)) == {1}
    assert set(span_lengths(GRID, 0.2, 1, beyond)) == {1}
    assert span_lengths(np.array([0.0, np.nextafter(1.0, 0.0)]), 0.2, 10, beyond).tolist() == [1, 10]


def test_the_draws_of_rows_give_this_distribution():
    collator = RandomSpanCollator(letters_tokenizer())
    rows, _ = collator.plan([{"input_ids": [5], "row_id": row} for row in range(30_000)])
    lengths = span_lengths(rows.draws.uniform("length", np.arange(30_000), np.zeros(30_000, int)), 0.2, 10, "truncate")
    shares = 0.8 ** np.arange(10) / (0.8 ** np.arange(10)).sum()
    assert stats.chisquare(np.bincount(lengths, minlength=11)[1:], shares * 30_000).pvalue > 1e-3


def select_by_hand(words, runs, budget, draws, row, settings):
    """Draw spans one after the other, with the numbers that a row's streams give.

    Args:
        words: Places of each word's tokens, in the order of the row.
        runs: Number of the run of text that each word lies in.
    """
    token_to_word = [number for number, places in enumerate(words) for _ in places]
    span, left, number = [None] * len(words), budget, 0
    while left and any(each is None and len(places) <= left for each, places in zip(span, words, strict=True)):
        anchor = draws.bits("anchor", np.array([row]), np.array([number]))[0]
        word = token_to_word[int(anchor) * len(token_to_word) >> 32]
        length = span_lengths(draws.uniform("length", np.array([row]), np.array([number])), *settings)[0]
        run = runs[word]
        for step in range(length):
            at = word + step
            if at >= len(words) or runs[at] != run or span[at] is not None or len(words[at]) > left:
                break
            span[at] = number
            left -= len(words[at])
        number += 1
    return span


@pytest.mark.parametrize("settings", [(0.2, 10, "truncate"), (0.5, 3, "clip")])
@pytest.mark.parametrize("probability", [0.15, 0.6])
def test_spans_equal_those_of_a_loop_over_rows_and_words(probability, settings):
    p, max_words, beyond = settings
    collator = RandomSpanCollator(
        letters_tokenizer(), p=p, max_words=max_words, beyond=beyond, mlm_probability=probability, return_unit_ids=True
    )
    rows = [row for row in examples(100, words=(8, 40)) if len(row["input_ids"]) > 2]
    batch, (prepared, _) = collator(rows), collator.plan(rows)
    compared = 0
    for number, row in enumerate(rows):
        words, _ = words_by_hand(row["input_ids"][1:-1])
        tokens = sum(map(len, words))
        budget = max(1, round(probability * tokens))
        span = select_by_hand(words, [0] * len(words), budget, prepared.draws, number, settings)
        if all(each is None for each in span):
            continue  # all words exceed the budget: another test
        compared += 1
        expected = np.full(tokens, -1)
        for places, each in zip(words, span, strict=True):
            expected[places] = -1 if each is None else each
        labels = batch["labels"][number].numpy()[1 : tokens + 1]
        np.testing.assert_array_equal(labels >= 0, expected >= 0)
        for unit in units_of(batch, number):
            assert len(set(expected[unit - 1])) == 1  # a unit is a span, or a word that is not masked
        units = batch["unit_ids"][number].numpy()[1 : tokens + 1]
        masked = {(a, b) for a, b in zip(expected, units, strict=True) if a >= 0}
        assert len(masked) == len({a for a, _ in masked}) == len({b for _, b in masked})
    assert compared > 90


def test_a_span_begins_at_the_word_of_a_random_token_so_long_words_are_favoured():
    # Of one word of 3 tokens and 7 of 1 token, 3 of 10 tokens may be masked: the long one if it is drawn first.
    ids = ids_of("a b i fgh j a b i")
    count = 20_000
    collator = RandomSpanCollator(letters_tokenizer(), mlm_probability=0.3, max_words=1)
    labels = collator([{"input_ids": ids, "row_id": row} for row in range(count)])["labels"].numpy()
    long = (labels[:, 3:6] >= 0).all(axis=1)
    assert ((labels >= 0).sum(axis=1) == 3).all()
    np.testing.assert_array_equal(long, (labels[:, 3:6] >= 0).any(axis=1))
    assert abs(long.mean() - 3 / 10) < 3 * np.sqrt(0.21 / count)  # 1/8 if words were drawn


def test_the_last_span_is_shortened_to_the_words_that_fit():
    # 3 of 20 one-token words: a first span of 3 words or more, 51 % of all, is cut to exactly 3.
    count = 20_000
    rows = [{"input_ids": ids_of("a b " * 10), "row_id": row} for row in range(count)]
    batch = RandomSpanCollator(letters_tokenizer(), return_unit_ids=True)(rows)
    masked = batch["labels"].numpy() >= 0
    assert (masked.sum(axis=1) == 3).all()
    units = np.where(masked, batch["unit_ids"].numpy(), -1)
    sizes = np.array([np.bincount(row[row >= 0]).max() for row in units])
    shares = 0.8 ** np.arange(10) / (0.8 ** np.arange(10)).sum()
    whole = shares[2:].sum() * 18 / 20  # from the last two words on there is no room for three
    assert (sizes == 3).mean() > whole - 3 * np.sqrt(0.25 / count)
    assert (sizes == 3).mean() < whole + shares[2:].sum() * 2 / 20


def test_a_word_that_does_not_fit_is_never_cut():
    rows = [{"input_ids": ids_of("klmn a klmn b klmn a klmn"), "row_id": row} for row in range(500)]
    labels = RandomSpanCollator(letters_tokenizer(), mlm_probability=0.3)(rows)["labels"].numpy()  # 6 of 19 tokens
    for begin in (0, 5, 10, 15):
        word = labels[:, begin : begin + 4] >= 0
        np.testing.assert_array_equal(word.any(axis=1), word.all(axis=1))
    spent = (labels >= 0).sum(axis=1)
    assert set(spent) <= {3, 6}  # 3 where the three single tokens went first


def test_spans_end_before_special_tokens_and_taken_words():
    tokenizer = letters_tokenizer()
    ids = ids_of("a b i j")
    row = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id, *ids, tokenizer.sep_token_id]
    rows = [{"input_ids": row, "row_id": number} for number in range(2000)]
    batch = RandomSpanCollator(tokenizer, mlm_probability=0.75, return_unit_ids=True)(rows)
    masked = batch["labels"].numpy() >= 0
    assert (masked.sum(axis=1) == 6).all()
    assert not masked[:, [0, 5, 10]].any()
    for number in range(2000):
        for unit in units_of(batch, number):
            assert len(unit) == 1 or not {4, 6} <= set(unit.tolist())
            assert (np.diff(unit) == 1).all()


def test_all_words_can_be_masked():
    rows = examples(30, words=(5, 40))
    batch = RandomSpanCollator(letters_tokenizer(), mlm_probability=1.0, return_unit_ids=True)(rows)
    assert ((batch["labels"] >= 0) == (batch["unit_ids"] >= 0)).all()


def test_a_row_whose_words_all_exceed_the_budget_masks_its_smallest_word():
    rows = [{"input_ids": ids_of("klmn klmn fgh klmn"), "row_id": row} for row in range(20)]
    batch = RandomSpanCollator(letters_tokenizer(), mlm_probability=0.1, return_unit_ids=True)(rows)
    masked = batch["labels"].numpy() >= 0
    assert {tuple(np.flatnonzero(row)) for row in masked} == {(8, 9, 10)}
    assert [len(units_of(batch, row)) for row in range(20)] == [4] * 20


def test_spans_of_real_text_are_about_as_long_as_their_distribution_says():
    tokenizer = make_tokenizer("wordpiece")
    collator = RandomSpanCollator(tokenizer, mlm_probability=0.15, return_unit_ids=True)
    batch = collator([{**row, "epoch": epoch} for row in articles("wordpiece") for epoch in range(3)])
    lengths = []
    for row in range(len(batch["labels"])):
        labels = batch["labels"][row].numpy()
        begins = ~np.array([piece.startswith("##") for piece in tokenizer.convert_ids_to_tokens(labels.clip(0))])
        lengths += [begins[unit].sum() for unit in units_of(batch, row) if labels[unit[0]] >= 0]
    assert 2.5 < np.mean(lengths) < 3.797  # shortened by the budget of 10 of 64 tokens, and never longer
    assert 5 < max(lengths) <= 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(p=0.0), r"p must be in \(0, 1\], got 0.0"),
        (dict(p=1.5), r"p must be in \(0, 1\], got 1.5"),
        (dict(max_words=0), "max_words must be at least 1, got 0"),
        (dict(beyond="cut"), "beyond must be 'truncate' or 'clip', got 'cut'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomSpanCollator(letters_tokenizer(), **settings)
