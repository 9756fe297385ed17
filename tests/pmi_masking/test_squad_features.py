import numpy as np
import pytest
import torch

from lightning_iclr.pmi_masking.pairs import PairEncoder
from lightning_iclr.pmi_masking.squad_features import (
    Question,
    SpanFeatures,
    answers,
    best_spans,
    best_window,
    token_span,
    windows,
)
from lightning_iclr.sampling import SampleKey
from tests.pmi_masking.toys import KINDS, make_tokenizer, paragraphs


def ask(context, answer=None, begin=None, number=0):
    begin = context.index(answer) if begin is None and answer else begin
    found = () if answer is None else (answer,)
    return Question(f"q{number}", "where is it?", context, found, -1 if answer is None else begin)


def berts_windows(length, room, stride):
    """The loop of BERT's run_squad.py, as the paper on SQuAD's baseline describes it."""
    spans, start = [], 0
    while start < length:
        taken = min(length - start, room)
        spans.append((start, start + taken))
        if start + taken == length:
            break
        start += min(taken, stride)
    return spans


@pytest.mark.parametrize(("length", "room", "stride"), [(1, 5, 2), (5, 5, 2), (6, 5, 2), (300, 50, 50), (411, 64, 17)])
def test_windows_begin_at_every_stride_and_cover_the_text(length, room, stride):
    found = windows(length, room, stride)
    assert found == berts_windows(length, room, stride)
    assert {token for begin, end in found for token in range(begin, end)} == set(range(length))


def test_an_empty_text_is_one_empty_window():
    assert windows(0, 5, 2) == [(0, 0)]


def test_a_token_belongs_to_the_window_that_shows_most_around_it():
    places = windows(57, 20, 7)
    found = best_window(57, places)
    for token in range(57):
        scores = [
            min(token - begin, end - 1 - token) + 0.01 * (end - begin) if begin <= token < end else -1
            for begin, end in places
        ]
        assert found[token] == scores.index(max(scores))


@pytest.mark.parametrize("kind", KINDS)
def test_every_window_gives_back_the_answer_of_its_positions(kind):
    encoder = PairEncoder(make_tokenizer(kind))
    texts = [text for text in paragraphs()[400:600] if len(text.split()) > 60][:8]
    questions = []
    for number, text in enumerate(texts):
        word = max(text.split(), key=len)
        questions.append(ask(text, word, number=number))
    rows = SpanFeatures(questions, encoder, max_length=60, document_stride=16)
    found = set()
    for window in rows:
        first, last = window.positions.tolist()
        if first == window.null:
            assert last == window.null
            continue
        question = questions[window.row]
        begin, end = window.offsets[first, 0], window.offsets[last, 1]
        text = question.context[begin:end].strip()
        assert question.answers[0] in text
        assert len(text) <= len(question.answers[0]) + 2  # a piece may hold a neighbouring mark
        ids = encoder.tokenizer.convert_ids_to_tokens(window.joined[0].tolist())
        assert ids[window.null] == "[CLS]"
        found.add(window.row)
    assert found == set(range(len(questions)))


def test_an_answer_that_a_window_does_not_hold_whole_is_none_in_it():
    encoder = PairEncoder("embedded")
    context = " ".join(["rain"] * 10 + ["new", "york"] + ["rain"] * 10)
    rows = SpanFeatures([ask(context, "new york")], encoder, max_length=15, document_stride=1)
    length = 15 - 3 - len(encoder.encode(["where is it?"])[0].ids)
    held = [begin <= 10 and end >= 12 for begin, end in windows(22, length, 1)]
    assert [bool((window.positions != window.null).any()) for window in rows] == held
    assert True in held
    assert False in held


def test_an_answer_may_begin_at_each_token_of_a_text_in_one_window_alone():
    encoder = PairEncoder("embedded")
    rows = SpanFeatures([ask("the rain in spain stays mainly in the plain " * 3)], encoder, 24, document_stride=5)
    begins = [tuple(place) for window in rows for place in window.offsets[window.begins].tolist()]
    (tokens,) = encoder.encode([rows.questions[0].context])
    assert sorted(begins) == sorted(map(tuple, tokens.offsets.tolist()))
    assert len(rows) > 3


def test_tokens_of_a_stretch_are_all_that_hold_a_character_of_it():
    offsets = np.asarray([[0, 3], [3, 8], [8, 9], [10, 14]])
    for begin in range(14):
        for end in range(begin + 1, 15):
            held = [n for n, (a, b) in enumerate(offsets.tolist()) if a < end and begin < b]
            assert token_span(offsets, begin, end) == ((held[0], held[-1]) if held else None)


@pytest.mark.parametrize("side", ["right", "left"])
def test_best_spans_are_those_of_all_pairs(side):
    encoder = PairEncoder("embedded")
    encoder.tokenizer.padding_side = side
    texts = ["the rain in spain stays mainly in the plain " * 3, "short text", "it rains in new york " * 4]
    questions = [ask(text, number=n) for n, text in enumerate(texts)]
    rows = SpanFeatures(questions, encoder, max_length=24, document_stride=6)
    batch = rows.collate([rows[n] for n in range(len(rows))])
    torch.manual_seed(0)
    logits = torch.randn(len(rows), batch.inputs["input_ids"].shape[1], 2)
    found = best_spans(logits, batch, max_answer_length=4)
    for place, window in enumerate(rows):
        shift = batch.inputs["input_ids"].shape[1] - len(window.joined[0]) if side == "left" else 0
        best = (-float("inf"), 0, 0)
        for first in np.flatnonzero(window.begins):
            for last in range(first, min(first + 4, len(window.offsets))):
                if window.offsets[last, 0] >= 0:
                    score = float(logits[place, first + shift, 0] + logits[place, last + shift, 1])
                    best = max(best, (score, window.offsets[first, 0], window.offsets[last, 1]))
        null = float(logits[place, window.null + shift].sum())
        assert found[place].tolist() == pytest.approx([window.row, null, *best])


def test_a_question_takes_the_best_answer_and_the_least_null_score_of_its_windows():
    questions = [ask("alpha beta gamma", number=n) for n in range(4)]
    spans = torch.tensor([[3, 5.0, 1.0, 0, 5], [1, 2.0, 7.0, 6, 10], [3, 4.0, 6.0, 10, 16], [1, 9.0, 6.0, 0, 5]])
    rows, texts, odds = answers(spans, questions)
    assert rows == [1, 3]
    assert texts == ["beta", "gamma"]
    assert odds.tolist() == [-5.0, -2.0]


def test_a_window_that_only_fills_up_has_no_row():
    rows = SpanFeatures([ask("some text")], PairEncoder("embedded"), max_length=40, document_stride=8)
    assert rows[SampleKey(0, 0, True)].row == -1
    assert rows[SampleKey(0, 0, False)].row == rows[0].row == 0


def test_a_stride_that_does_not_fit_beside_the_question_is_refused():
    with pytest.raises(ValueError, match=r"max_length must hold document_stride tokens .* got 12 for 8 \+ 7"):
        SpanFeatures([ask("some text")], PairEncoder("embedded"), max_length=12, document_stride=8)


def test_a_long_question_is_cut():
    question = ask("some text")._replace(text="why " * 50)
    rows = SpanFeatures([question], PairEncoder("embedded"), max_length=40, document_stride=8, max_query_length=5)
    assert len(rows[0].joined[0]) == 5 + 3 + 2
