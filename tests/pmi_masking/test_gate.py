"""What must hold on the embedded text however training goes: the ranking, the budget, and collocations masked whole."""

from functools import cache
from math import comb

import numpy as np
import pytest

from lightning_iclr.pmi_masking import (
    MaskingVocabulary,
    PMIMaskingCollator,
    RandomTokenCollator,
    WholeWordCollator,
    load_tokenizer,
)
from tests.pmi_masking.toys import paragraphs

LENGTH = 64


@cache
def texts():
    return paragraphs()[:1500]


@cache
def vocabulary():
    return MaskingVocabulary.build(texts(), size=2000, min_count=2)


def rows(epochs):
    """Rows of paragraphs, one after the other, in several epochs."""
    ids = [number for own in load_tokenizer("embedded")(texts()[:250])["input_ids"] for number in own]
    cut = [ids[begin : begin + LENGTH] for begin in range(0, len(ids) - LENGTH, LENGTH)]
    return [{"input_ids": row, "row_id": n, "epoch": epoch} for epoch in range(epochs) for n, row in enumerate(cut)]


def test_a_planted_trigram_with_a_weak_link_is_demoted_by_pmi_and_not_by_naive_pmi():
    # "the zorbal quintek" is the pair, which occurs by itself as well, after the most frequent word; the words of
    # "velt of rosp" are never apart.
    rng = np.random.default_rng(0)
    planted = ["zorbal quintek"] * 40 + ["the zorbal quintek"] * 12 + ["velt of rosp"] * 12
    own = [*texts()]
    for phrase, place in zip(planted, rng.permutation(len(own)), strict=False):
        own[place] += f", {phrase}"
    built = {
        score: MaskingVocabulary.build(own, size=1000, min_count=3, proportions=(0.6, 0.4), score=score)
        for score in ("pmi", "naive_pmi")
    }
    ranked = {score: [row["words"] for row in each.table.to_pylist() if row["n"] == 3] for score, each in built.items()}
    assert len(ranked["pmi"]) == len(ranked["naive_pmi"]) == 400
    assert "the zorbal quintek" in ranked["naive_pmi"]
    assert "the zorbal quintek" not in ranked["pmi"]
    assert "velt of rosp" in ranked["pmi"]
    assert all("zorbal quintek" in each for each in built.values())


@pytest.mark.parametrize("kind", ["token", "word", "pmi"])
def test_every_row_spends_fifteen_percent_exactly(kind):
    tokenizer = load_tokenizer("embedded")
    collator = {
        "token": RandomTokenCollator,
        "word": WholeWordCollator,
        "pmi": lambda tokenizer: PMIMaskingCollator(tokenizer, vocabulary()),
    }[kind](tokenizer)
    batch = collator(rows(1))
    special = np.isin([row["input_ids"] for row in rows(1)], tokenizer.all_special_ids)
    budgets = [max(1, round(0.15 * count)) for count in (~special).sum(axis=1).tolist()]
    assert len(budgets) > 200
    assert (batch["labels"] >= 0).sum(dim=1).tolist() == budgets


def test_collocations_are_masked_whole_by_pmi_and_as_rarely_as_by_chance_by_single_tokens():
    tokenizer, examples = load_tokenizer("embedded"), rows(4)
    pmi = PMIMaskingCollator(tokenizer, vocabulary(), return_unit_ids=True)(examples)
    words = WholeWordCollator(tokenizer, return_unit_ids=True)(examples)["unit_ids"].numpy()
    tokens = RandomTokenCollator(tokenizer)(examples)["labels"].numpy() >= 0
    masked, units = pmi["labels"].numpy() >= 0, pmi["unit_ids"].numpy()
    touched = {"pmi": 0, "token": 0}
    whole = {"pmi": 0, "token": 0}
    chances, variance, powers = 0.0, 0.0, 0.0
    for row in range(len(examples)):
        usable = int((units[row] >= 0).sum())
        budget = max(1, round(0.15 * usable))
        for unit in range(units[row].max() + 1):
            places = np.flatnonzero(units[row] == unit)
            size = len(places)
            if len(set(words[row][places])) == 1:
                continue  # a single word
            for name, own in (("pmi", masked), ("token", tokens)):
                touched[name] += own[row][places].any()
                whole[name] += own[row][places].all()
            chance = comb(usable - size, budget - size) / comb(usable, budget) if size <= budget else 0.0
            chances, variance = chances + chance, variance + chance * (1 - chance)
            powers += 0.15**size
    assert whole["pmi"] == touched["pmi"] > 200
    assert touched["token"] > 500
    assert abs(whole["token"] - chances) < 4 * np.sqrt(variance)
    assert 0.7 < chances / powers < 1  # about 0.15 to the power of the tokens, and less: the budget is exact
    assert whole["pmi"] > 4 * whole["token"]
