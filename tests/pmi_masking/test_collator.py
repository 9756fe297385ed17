"""Collators: the exact share, whole units, 80/10/10, and masks that depend on nothing but (seed, epoch, row)."""

import pickle
import re
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from lightning_iclr.pmi_masking.collator import (
    PMIMaskingCollator,
    RandomTokenCollator,
    WholeWordCollator,
    units_by_length,
)
from lightning_iclr.pmi_masking.spans import RandomSpanCollator
from lightning_iclr.pmi_masking.vocabulary import MaskingVocabulary
from tests.pmi_masking.test_segmentation import choose_by_hand, maximal_by_hand, walk
from tests.pmi_masking.toys import KINDS, letters_tokenizer, list_of, make_tokenizer, paragraphs

WORDS = ["a", "b", "c", "de", "fgh", "i", "j", "klmn"]
ENTRIES = [
    "a b",
    "b c",
    "a b c",
    "c de",
    "de fgh i",
    "i j",
    "j klmn",
    "klmn a",
    "b c de fgh",
    "j j j j j",
    "a c",
    "c a",
    "b a",
    "c b",
    "de a",
]


@cache
def vocabulary():
    return list_of(*ENTRIES)


@cache
def wikipedia_vocabulary():
    return MaskingVocabulary.build(paragraphs()[:600], size=1200, min_count=2)


def pmi(tokenizer, **settings):
    letters = tokenizer is letters_tokenizer()
    return PMIMaskingCollator(tokenizer, vocabulary() if letters else wikipedia_vocabulary(), **settings)


COLLATORS = {"token": RandomTokenCollator, "word": WholeWordCollator, "span": RandomSpanCollator, "pmi": pmi}


def examples(count, seed=0, epoch=0, words=(0, 40)):
    """Return rows of random words, some with commas, between [CLS] and [SEP]."""
    tokenizer, rng = letters_tokenizer(), np.random.default_rng(seed)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    made = []
    for number in range(count):
        drawn = rng.choice([*WORDS, ","], rng.integers(*words), p=[*[0.95 / len(WORDS)] * len(WORDS), 0.05])
        ids = tokenizer(" ".join(drawn), add_special_tokens=False)["input_ids"]
        made.append({"input_ids": [cls, *ids, sep], "row_id": number, "epoch": epoch})
    return made


@cache
def articles(kind, length=64):
    """Return rows of real text of one length."""
    ids = make_tokenizer(kind)(paragraphs()[600:900], add_special_tokens=False)["input_ids"]
    return [{"input_ids": row[:length], "row_id": number} for number, row in enumerate(ids) if len(row) >= length]


def units_of(batch, row):
    """Return the places of each unit of a row."""
    ids = batch["unit_ids"][row].numpy()
    return [np.flatnonzero(ids == number) for number in range(ids.max() + 1)] if len(ids) else []


@pytest.mark.parametrize("probability", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("name", COLLATORS)
def test_every_row_spends_its_exact_budget_on_whole_units(name, probability):
    collator = COLLATORS[name](letters_tokenizer(), mlm_probability=probability, return_unit_ids=True)
    batch = collator(examples(150))
    exact = 0
    for row, labels in enumerate(batch["labels"].numpy()):
        units = units_of(batch, row)
        tokens = sum(map(len, units))
        budget = max(1, round(probability * tokens)) if tokens else 0
        chosen = [bool((labels[unit] >= 0).all()) for unit in units]
        assert chosen == [bool((labels[unit] >= 0).any()) for unit in units]  # all or none
        spent = int((labels >= 0).sum())
        smallest = min(map(len, units), default=0)
        if name != "span":  # its units are what it has drawn: their sizes say nothing about what else would have fitted
            left = [len(unit) for unit, yes in zip(units, chosen, strict=True) if not yes]
            assert spent <= budget < spent + min(left, default=np.inf) or (spent == smallest > budget)
        exact += spent == budget
    assert exact == 150 if name == "token" else exact > 120


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COLLATORS)
def test_fifteen_percent_of_real_text_is_masked_in_every_row(name, kind):
    tokenizer = make_tokenizer(kind)
    batch = COLLATORS[name](tokenizer, return_unit_ids=True)(articles(kind))
    tokens = (batch["unit_ids"] >= 0).sum(dim=1)
    budgets = [max(1, round(0.15 * count)) for count in tokens.tolist()]
    spent = (batch["labels"] >= 0).sum(dim=1)
    assert len(budgets) > 100
    assert spent.tolist() == budgets


@pytest.mark.parametrize("name", COLLATORS)
def test_labels_are_the_original_tokens_and_all_others_stay(name):
    rows = examples(200)
    batch = COLLATORS[name](letters_tokenizer())(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert {value.dtype for value in batch.values()} == {torch.int64}
    for number, row in enumerate(rows):
        original = np.array(row["input_ids"])
        labels, tokens = batch["labels"][number].numpy(), batch["input_ids"][number].numpy()
        predicted = np.flatnonzero(labels != -100)
        assert predicted.max(initial=0) < len(original)
        np.testing.assert_array_equal(labels[predicted], original[predicted])
        kept = np.delete(np.arange(len(original)), predicted)
        np.testing.assert_array_equal(tokens[kept], original[kept])
        assert (tokens[len(original) :] == letters_tokenizer().pad_token_id).all()
        assert batch["attention_mask"][number].sum() == len(original)
        assert not set(labels.tolist()) & set(letters_tokenizer().all_special_ids)


def actions(name, kind, **settings):
    """Return how many tokens each chosen unit has, and what became of it."""
    tokenizer = make_tokenizer(kind)
    collator = COLLATORS[name](tokenizer, return_unit_ids=True, mlm_probability=0.3, **settings)
    found = []
    for epoch in range(6):
        batch = collator([{**row, "epoch": epoch} for row in articles(kind)])
        for row in range(len(batch["labels"])):
            labels, tokens = batch["labels"][row].numpy(), batch["input_ids"][row].numpy()
            for unit in units_of(batch, row):
                if labels[unit[0]] >= 0:
                    masks = tokens[unit] == tokenizer.mask_token_id
                    same = tokens[unit] == labels[unit]
                    assert masks.all() or not masks.any()  # one action for all of a unit
                    assert len(unit) < 4 or same.all() or same.sum() < 3
                    assert not set(tokens[unit].tolist()) & (set(tokenizer.all_special_ids) - {tokenizer.mask_token_id})
                    found.append((len(unit), "mask" if masks.all() else "keep" if same.all() else "random"))
    return found


@pytest.mark.parametrize("name", COLLATORS)
def test_units_are_masked_randomised_and_kept_in_eighty_ten_ten(name):
    found = actions(name, "wordpiece")
    longer = [action for size, action in found if size > 1]
    assert name == "token" or len(longer) > 500
    for group in [[action for _, action in found], longer] if name != "token" else [[action for _, action in found]]:
        for action, share in (("mask", 0.8), ("random", 0.1), ("keep", 0.1)):
            sigma = np.sqrt(share * (1 - share) / len(group))
            assert abs(group.count(action) / len(group) - share) < 3 * sigma


def test_other_shares_of_actions_are_kept_to():
    assert {action for _, action in actions("pmi", "wordpiece", mask_replace_prob=1.0, random_replace_prob=0.0)} == {
        "mask"
    }
    assert {action for _, action in actions("pmi", "wordpiece", mask_replace_prob=0.0, random_replace_prob=0.0)} == {
        "keep"
    }
    swapped = [action for _, action in actions("word", "wordpiece", mask_replace_prob=0.0, random_replace_prob=1.0)]
    assert swapped.count("random") > 0.998 * len(swapped)  # a token is swapped for itself in 1 of 8,000 cases


def test_random_tokens_are_drawn_evenly_and_one_by_one():
    tokenizer = letters_tokenizer()
    collator = WholeWordCollator(tokenizer, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=1.0)
    batch = collator(
        [
            {"input_ids": tokenizer("klmn " * 40, add_special_tokens=False)["input_ids"], "row_id": row}
            for row in range(100)
        ]
    )
    tokens = batch["input_ids"].numpy()
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    counts = [np.count_nonzero(tokens == number) for number in ordinary]
    assert sum(counts) == tokens.size
    assert stats.chisquare(counts).pvalue > 1e-3
    pairs = np.mean(tokens[:, 0::4] == tokens[:, 1::4])  # within a word
    assert abs(pairs - 1 / len(ordinary)) < 4 * np.sqrt(1 / len(ordinary) / 4000)


@pytest.mark.parametrize("name", COLLATORS)
def test_no_unit_crosses_a_special_token_padding_or_the_border_of_a_document(name):
    tokenizer = letters_tokenizer()
    rows = examples(60, words=(5, 40))
    for row in rows:
        count = len(row["input_ids"])
        row["document_ids"] = (np.arange(count) // 7).tolist()
        row["input_ids"].insert(count // 2, tokenizer.sep_token_id)
        row["document_ids"].insert(count // 2, row["document_ids"][count // 2])
    for probability in (0.15, 0.9):
        batch = COLLATORS[name](tokenizer, mlm_probability=probability, return_unit_ids=True)(rows)
        for number, row in enumerate(rows):
            ids = batch["unit_ids"][number].numpy()
            special = np.isin(row["input_ids"], tokenizer.all_special_ids)
            np.testing.assert_array_equal(ids[: len(special)] == -1, special)
            assert (ids[len(special) :] == -1).all()
            for unit in units_of(batch, number):
                assert (np.diff(unit) == 1).all()
                assert len({row["document_ids"][place] for place in unit}) == 1


def test_documents_part_what_would_be_one_ngram():
    tokenizer = letters_tokenizer()
    ids = tokenizer("a b c de", add_special_tokens=False)["input_ids"]
    collator = PMIMaskingCollator(tokenizer, vocabulary(), return_unit_ids=True)
    together = collator([{"input_ids": ids, "document_ids": [0, 0, 0, 0, 0]}])
    apart = collator([{"input_ids": ids, "document_ids": [0, 1, 1, 1, 1]}])
    assert together["unit_ids"].tolist() in ([[0, 0, 0, 1, 1]], [[0, 1, 2, 2, 2]])
    assert apart["unit_ids"].tolist() in ([[0, 1, 1, 2, 2]], [[0, 1, 2, 2, 2]])
    assert apart["document_ids"].tolist() == [[0, 1, 1, 1, 1]]


def words_by_hand(ids):
    """Return the words of a row as lists of places, for the letters' tokenizer, and what they spell."""
    words = []
    for place, token in enumerate(letters_tokenizer().convert_ids_to_tokens(ids)):
        if token.startswith("##"):
            words[-1][0].append(place)
            words[-1][1] += token[2:]
        else:
            words.append([[place], token])
    return [places for places, _ in words], [spelt for _, spelt in words]


def test_segmentation_and_budget_equal_the_sequential_walks_given_the_same_priorities():
    rows = [row for row in examples(400, words=(1, 40)) if len(row["input_ids"]) > 2]
    collator = PMIMaskingCollator(letters_tokenizer(), vocabulary(), mlm_probability=0.3, return_unit_ids=True)
    batch = collator(rows)
    prepared, _ = collator.plan(rows)
    several = 0
    for number, row in enumerate(rows):
        places, words = words_by_hand(row["input_ids"][1:-1])
        ends = list(range(len(words)))
        for begin in range(len(words)):
            for n in range(2, 6):
                if " ".join(words[begin : begin + n]) in ENTRIES and begin + n <= len(words):
                    ends[begin] = begin + n - 1
        matches = maximal_by_hand(ends)
        columns = np.array([places[begin][0] + 1 for begin, _ in matches], int)  # 1 for [CLS]
        overlap = prepared.draws.bits("overlap", np.full(len(columns), number), columns).tolist()
        stays = walk([begin for begin, _ in matches], [end for _, end in matches], overlap)
        several += len(stays) - sum(stays)
        inside = {}
        for (begin, end), yes in zip(matches, stays, strict=True):
            inside.update({word: begin for word in range(begin + 1, end + 1) if yes})
        units = []
        for word, own in enumerate(places):
            if word in inside:
                units[-1] += own
            else:
                units.append(list(own))
        found = [(unit - 1).tolist() for unit in units_of(batch, number)]
        assert found == units

        sizes = [len(unit) for unit in units]
        order = prepared.draws.bits(
            "priority", np.full(len(units), number), np.array([unit[0] + 1 for unit in units])
        ).tolist()
        chosen = choose_by_hand([0] * len(units), sizes, [max(1, round(0.3 * sum(sizes)))], order)
        labels = batch["labels"][number].numpy()
        assert [bool(labels[unit[0] + 1] >= 0) for unit in units] == chosen
    assert several > 100


def test_whole_word_units_are_the_words():
    rows = examples(50)
    batch = WholeWordCollator(letters_tokenizer(), return_unit_ids=True)(rows)
    for number, row in enumerate(rows):
        places, _ = words_by_hand(row["input_ids"][1:-1])
        assert [(unit - 1).tolist() for unit in units_of(batch, number)] == places


def test_random_token_units_are_the_tokens():
    rows = examples(50)
    batch = RandomTokenCollator(letters_tokenizer(), return_unit_ids=True)(rows)
    for number, row in enumerate(rows):
        assert batch["unit_ids"][number].tolist()[1 : len(row["input_ids"]) - 1] == list(
            range(len(row["input_ids"]) - 2)
        )


def test_the_tokens_with_the_smallest_numbers_of_a_row_are_masked():
    rows = examples(100)
    collator = RandomTokenCollator(letters_tokenizer(), mlm_probability=0.3)
    labels = collator(rows)["labels"].numpy()
    prepared, _ = collator.plan(rows)
    for number, row in enumerate(rows):
        count = len(row["input_ids"]) - 2
        budget = max(1, round(0.3 * count)) if count else 0
        numbers = prepared.draws.bits("priority", np.full(count, number), np.arange(1, count + 1))
        assert np.flatnonzero(labels[number] >= 0).tolist() == sorted(1 + np.argsort(numbers)[:budget])


def test_overlapping_entries_are_units_half_of_the_time_each_and_the_middle_of_three_a_third():
    tokenizer = letters_tokenizer()
    built = list_of("a b", "b c", "c d", "x y", "y z")
    ids = tokenizer("a b c d , x y z", add_special_tokens=False)["input_ids"]
    count = 20_000
    batch = PMIMaskingCollator(tokenizer, built, return_unit_ids=True)(
        [{"input_ids": ids, "row_id": row} for row in range(count)]
    )
    units = batch["unit_ids"].numpy()
    middle = units[:, 1] == units[:, 2]
    ends = (units[:, 0] == units[:, 1]) & (units[:, 2] == units[:, 3])
    assert (middle ^ ends).all()
    assert abs(middle.mean() - 1 / 3) < 3 * np.sqrt(2 / 9 / count)
    first, second = units[:, 5] == units[:, 6], units[:, 6] == units[:, 7]
    assert (first ^ second).all()
    assert abs(first.mean() - 1 / 2) < 3 * np.sqrt(1 / 4 / count)


def test_collocations_are_masked_whole_by_pmi_and_hardly_ever_by_single_tokens():
    tokenizer = letters_tokenizer()
    ids = tokenizer("x y z , " + "p q " * 20, add_special_tokens=False)["input_ids"]
    built = list_of("x y z")
    count = 20_000
    rows = [{"input_ids": ids, "row_id": row} for row in range(count)]
    whole = {}
    for name, collator in {
        "pmi": PMIMaskingCollator(tokenizer, built),
        "token": RandomTokenCollator(tokenizer),
    }.items():
        masked = collator(rows)["labels"].numpy()[:, :3] >= 0
        whole[name] = masked.all(axis=1).mean()
        assert name == "token" or (masked.any(axis=1) == masked.all(axis=1)).all()
    budget, tokens = 7, 44
    chance = (budget * (budget - 1) * (budget - 2)) / (tokens * (tokens - 1) * (tokens - 2))  # about 0.15 cubed
    assert abs(whole["token"] - chance) < 4 * np.sqrt(chance / count)
    assert whole["pmi"] > 25 * chance


MANY = [dict(row, epoch=3) for row in examples(64)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", COLLATORS)
def test_masks_do_not_depend_on_the_other_rows_their_order_or_the_padding(name, side):
    tokenizer = pickle.loads(pickle.dumps(letters_tokenizer()))
    tokenizer.padding_side = side
    make = (
        (lambda **kw: PMIMaskingCollator(tokenizer, vocabulary(), **kw))
        if name == "pmi"
        else lambda **kw: COLLATORS[name](tokenizer, **kw)
    )
    rows = MANY + [  # rows whose units all exceed the budget, with ties
        {
            "input_ids": tokenizer("fgh klmn fgh klmn fgh", add_special_tokens=False)["input_ids"],
            "row_id": 900 + extra,
            "epoch": 3,
        }
        for extra in range(16)
    ]

    def masked(collator, batch):
        out = collator(batch)
        found = {}
        for number, row in enumerate(batch):
            real = out["attention_mask"][number].bool()
            assert real.sum() == len(row["input_ids"])
            found[row["row_id"]] = (out["input_ids"][number][real].tolist(), out["labels"][number][real].tolist())
        return found

    expected = {}
    for row in rows:
        expected |= masked(make(mlm_probability=0.12), [row])
    torch.manual_seed(1)
    assert masked(make(mlm_probability=0.12), rows) == expected
    assert masked(make(mlm_probability=0.12, pad_to_multiple_of=64), rows[::-1]) == expected
    order = np.random.default_rng(0).permutation(len(rows))
    for begin in range(0, len(rows), 7):
        batch = [rows[place] for place in order[begin : begin + 7]]
        assert masked(make(mlm_probability=0.12), batch).items() <= expected.items()


@pytest.mark.parametrize("name", COLLATORS)
def test_left_and_right_padding_mask_the_same_tokens(name):
    left = pickle.loads(pickle.dumps(letters_tokenizer()))
    left.padding_side = "left"
    extra = [vocabulary()] if name == "pmi" else []
    kind = PMIMaskingCollator if name == "pmi" else COLLATORS[name]
    ours, theirs = kind(letters_tokenizer(), *extra)(MANY), kind(left, *extra)(MANY)
    assert (theirs["attention_mask"][:, 0] == 0).any()
    for key in ("input_ids", "labels"):
        for number in range(len(MANY)):
            a = ours[key][number][ours["attention_mask"][number].bool()]
            torch.testing.assert_close(theirs[key][number][theirs["attention_mask"][number].bool()], a)


@pytest.mark.parametrize("name", COLLATORS)
def test_masks_change_with_the_seed_the_epoch_and_the_row(name):
    def labels(seed=0, epoch=0, shift=0):
        rows = [dict(row, epoch=epoch, row_id=row["row_id"] + shift) for row in examples(50, words=(20, 40))]
        return COLLATORS[name](letters_tokenizer(), seed=seed)(rows)["labels"]

    first = labels()
    torch.testing.assert_close(labels(), first)
    for other in (labels(seed=1), labels(epoch=1), labels(shift=1)):
        same = (other == first).all(dim=1).float().mean()
        assert same < 0.2


@pytest.mark.parametrize("name", COLLATORS)
def test_examples_without_a_row_id_follow_torchs_generator(name):
    rows = [row["input_ids"] for row in examples(30, words=(10, 40))]
    collator = COLLATORS[name](letters_tokenizer())
    torch.manual_seed(3)
    first, second = collator(rows), collator(rows)
    torch.manual_seed(3)
    torch.testing.assert_close(collator(rows), first)
    assert not torch.equal(first["labels"], second["labels"])


@pytest.mark.parametrize("name", COLLATORS)
def test_masks_are_equal_with_none_and_two_workers(name):
    collator = COLLATORS[name](letters_tokenizer())
    alone, shared = (list(DataLoader(MANY, batch_size=16, collate_fn=collator, num_workers=count)) for count in (0, 2))
    assert len(alone) == 4
    for ours, theirs in zip(alone, shared, strict=True):
        torch.testing.assert_close(theirs, ours)


def test_workers_draw_apart_where_rows_have_no_id():
    rows = [examples(1, words=(30, 40))[0]["input_ids"]] * 32
    batches = list(DataLoader(rows, batch_size=8, collate_fn=RandomTokenCollator(letters_tokenizer()), num_workers=2))
    labels = torch.cat([batch["labels"] for batch in batches])
    assert len({tuple(row) for row in labels.tolist()}) == 32


@pytest.mark.parametrize("name", COLLATORS)
def test_collators_are_picklable(name):
    collator = COLLATORS[name](letters_tokenizer(), mlm_probability=by_epoch)
    torch.testing.assert_close(pickle.loads(pickle.dumps(collator))(MANY), collator(MANY))


def by_epoch(epoch):
    return 0.1 + 0.2 * epoch


@pytest.mark.parametrize("name", COLLATORS)
def test_the_share_can_follow_the_epoch_of_each_row(name):
    collator = COLLATORS[name](letters_tokenizer(), mlm_probability=by_epoch)
    rows = [dict(row, epoch=row["row_id"] % 3) for row in examples(60, words=(20, 40))]
    mixed = collator(rows)
    for epoch in range(3):
        fixed = COLLATORS[name](letters_tokenizer(), mlm_probability=by_epoch(epoch))(rows)
        torch.testing.assert_close(mixed["labels"][epoch::3], fixed["labels"][epoch::3])
    tensors = {
        "input_ids": torch.zeros(2, 9, dtype=torch.long) + 9,
        "epoch": torch.tensor([1, 4]),
        "row_id": torch.tensor([0, 1]),
    }
    assert (collator(tensors)["labels"] >= 0).sum(dim=1).tolist() == [3, 8]


def test_a_share_that_follows_the_epoch_needs_one_and_is_checked():
    collator = RandomTokenCollator(letters_tokenizer(), mlm_probability=by_epoch)
    with pytest.raises(
        ValueError, match="mlm_probability is a function of the epoch, and the examples have no key 'epoch'"
    ):
        collator([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"mlm_probability must be in \(0, 1\], got 1.1"):
        collator([{"input_ids": [5, 6, 7], "epoch": 5}])


@pytest.mark.parametrize("name", COLLATORS)
def test_rows_of_special_tokens_only_have_no_labels(name):
    tokenizer = letters_tokenizer()
    collator = COLLATORS[name](tokenizer, return_unit_ids=True)
    special = [tokenizer.cls_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id]
    for rows in ([special], [special, []], [special, [9, 9], []], [[]]):
        batch = collator(rows)
        for number, row in enumerate(rows):
            assert (batch["labels"][number] >= 0).sum() == (row == [9, 9])
            if row != [9, 9]:
                assert batch["input_ids"][number].tolist()[: len(row)] == row
                assert (batch["unit_ids"][number] == -1).all()


@pytest.mark.parametrize("name", COLLATORS)
def test_a_row_whose_smallest_unit_exceeds_the_budget_masks_that_one(name):
    tokenizer = letters_tokenizer()
    rows = [
        {"input_ids": tokenizer("klmn fgh klmn fgh", add_special_tokens=False)["input_ids"], "row_id": row}
        for row in range(40)
    ]
    labels = COLLATORS[name](tokenizer, mlm_probability=0.1)(rows)["labels"]  # 1 of 14 tokens
    masked = [tuple(np.flatnonzero(row >= 0).tolist()) for row in labels.numpy()]
    assert set(masked) == (
        {(4, 5, 6), (11, 12, 13)} if name != "token" else {(place,) for place in range(14)} & set(masked)
    )


def test_labels_that_came_with_the_examples_give_way():
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [1, 1, 1, 1]}, {"input_ids": [5, 6, 7, 8], "labels": [1, 1, 1, 1]}]
    labels = RandomTokenCollator(letters_tokenizer())(rows)["labels"]
    assert (labels == -100).sum() == 6


def test_a_batch_keeps_its_other_keys():
    rows = [
        dict(row, weight=0.5, title="x", token_type_ids=[1] * len(row["input_ids"]))
        for row in examples(4, words=(3, 9))
    ]
    batch = PMIMaskingCollator(letters_tokenizer(), vocabulary(), pad_to_multiple_of=8)(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "weight", "title", "token_type_ids"}
    assert batch["weight"].tolist() == [0.5] * 4
    assert batch["title"] == ["x"] * 4
    torch.testing.assert_close(batch["token_type_ids"], batch["attention_mask"])
    assert batch["input_ids"].shape[1] % 8 == 0


def test_a_vocabulary_can_be_named_by_its_file(tmp_path):
    vocabulary().save(tmp_path / "pmi.parquet")
    from_file = PMIMaskingCollator(letters_tokenizer(), str(tmp_path / "pmi.parquet"))
    torch.testing.assert_close(from_file(MANY), pmi(letters_tokenizer())(MANY))


@pytest.mark.parametrize("kind", KINDS)
def test_ngrams_of_real_text_are_units_whatever_the_tokenizer(kind):
    tokenizer = make_tokenizer(kind)
    built = list_of("prime minister", "the united states")
    text = "Prime minister (PRIME MINISTER) of the United States, “prime minister”."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = PMIMaskingCollator(tokenizer, built, return_unit_ids=True)([ids])
    spelt = {tokenizer.decode(np.array(ids)[unit]).strip(" (,.)“”").casefold() for unit in units_of(batch, 0)}
    assert {"prime minister", "the united states"} <= spelt
    assert not spelt & {"prime", "minister", "the", "united", "states"}


def test_long_units_are_chosen_as_rarely_as_the_skip_rule_says():
    # A unit of 3 tokens among 37 of 1: a budget of 6 of 40. It is chosen where at most 3 others come before it, which
    # is 4 places of 38; the others get what it leaves.
    tokenizer = letters_tokenizer()
    ids = tokenizer("x y z " + ", ".join(["p"] * 19), add_special_tokens=False)["input_ids"]
    assert len(ids) == 40
    rows = [{"input_ids": ids, "row_id": row} for row in range(20_000)]
    there, chosen = units_by_length(PMIMaskingCollator(tokenizer, list_of("x y z")), rows, longest=4)
    assert there.tolist() == [37 * 20_000, 0, 20_000, 0]
    rate = 4 / 38
    assert abs(chosen[2] / there[2] - rate) < 3 * np.sqrt(rate * (1 - rate) / 20_000)
    assert chosen[0] == 6 * 20_000 - 3 * chosen[2]
    assert chosen[2] / there[2] < 0.15 < chosen[0] / there[0]


def test_units_are_counted_by_their_length():
    rows = examples(60)
    for name in ("word", "pmi", "token"):
        collator = COLLATORS[name](letters_tokenizer(), return_unit_ids=True)
        batch = collator(rows)
        there, chosen = np.zeros(4, int), np.zeros(4, int)
        for row in range(len(rows)):
            for unit in units_of(batch, row):
                length = min(len(unit), 4) - 1
                there[length] += 1
                chosen[length] += bool(batch["labels"][row][unit[0]] >= 0)
        found = units_by_length(collator, rows, longest=4)
        assert [each.tolist() for each in found] == [there.tolist(), chosen.tolist()]
    assert [each.tolist() for each in units_by_length(collator, [[], []], longest=2)] == [[0, 0], [0, 0]]


def test_a_masking_of_ngrams_wants_a_vocabulary_before_its_first_batch():
    collator = PMIMaskingCollator(letters_tokenizer())
    with pytest.raises(
        ValueError, match="vocabulary must be given, or set by set_vocabulary, before a batch is masked"
    ):
        collator(MANY)
    collator.set_vocabulary(vocabulary())
    torch.testing.assert_close(collator(MANY), pmi(letters_tokenizer())(MANY))


class NoMask:
    mask_token_id = None


CONSTRUCTOR = {
    "mlm_probability must be in (0, 1], got 0.0": dict(mlm_probability=0.0),
    "mlm_probability must be in (0, 1], got 1.5": dict(mlm_probability=1.5),
    "mlm_probability must be in (0, 1], got -0.1": dict(mlm_probability=-0.1),
    "mlm_probability must be in (0, 1], got nan": dict(mlm_probability=float("nan")),
    "mask_replace_prob must be in [0, 1], got 1.2": dict(mask_replace_prob=1.2),
    "random_replace_prob must be in [0, 1], got -0.1": dict(random_replace_prob=-0.1),
    "must not add up to more than 1, got 0.8 and 0.3": dict(random_replace_prob=0.3),
    "denoising must be 'mask' or 'sentinels', got 'drop'": dict(denoising="drop"),
    "tokenizer must have sentinels <extra_id_0>, ...": dict(denoising="sentinels"),
    "return_unit_ids must be False with denoising='sentinels'": dict(denoising="sentinels", return_unit_ids=True),
}


@pytest.mark.parametrize("message", CONSTRUCTOR)
@pytest.mark.parametrize("name", COLLATORS)
def test_wrong_settings_are_refused_by_the_constructor(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        COLLATORS[name](letters_tokenizer(), **CONSTRUCTOR[message])


@pytest.mark.parametrize("kind", [RandomTokenCollator, WholeWordCollator, RandomSpanCollator])
def test_a_tokenizer_without_a_mask_token_is_refused(kind):
    with pytest.raises(ValueError, match="tokenizer must have a mask token, and NoMask has none"):
        kind(NoMask())


def test_a_missing_vocabulary_is_reported():
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        PMIMaskingCollator(letters_tokenizer(), "nowhere.txt")


@pytest.mark.parametrize("name", COLLATORS)
def test_the_token_ids_of_another_tokenizer_are_refused(name):
    ids = make_tokenizer("unigram")("some ordinary words", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="input_ids must be this tokenizer's, from 0 to 58, got"):
        COLLATORS[name](letters_tokenizer())([ids])


def test_a_trainer_of_transformers_learns_from_pmi_masks(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

    tokenizer = make_tokenizer("wordpiece")
    rows = [{"input_ids": row["input_ids"][:32]} for row in articles("wordpiece")[:64]]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=20,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    collator = PMIMaskingCollator(tokenizer, wikipedia_vocabulary())
    trainer = Trainer(BertForMaskedLM(config), settings, data_collator=collator, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.5  # from log 8000 towards the frequencies of words
