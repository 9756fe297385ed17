"""Questions about a text that is longer than the network's input: overlapping windows, and answers found in them.

As in BERT's run on SQuAD: the question stands first, cut at a number of tokens; windows over the text begin every
``document_stride`` tokens; where windows overlap, an answer may begin in the one that shows most around
its first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iclr.pmi_masking.pairs import PairEncoder, Tokens
from lightning_iclr.sampling import SampleKey


class Question(NamedTuple):
    """A question about a text.

    Attributes:
        id: Its name.
        text: The question.
        context: The text.
        answers: All right answers; none where the text holds none.
        begin: First character of the first answer in the text, -1 without one.
    """

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    begin: int


class SpanBatch(NamedTuple):
    """Windows over texts, each behind its question.

    Attributes:
        inputs: What the network takes, by name, each (B, L).
        positions: First and last token of the answer (B, 2), both at the null position where the window holds none.
        null: Null position, that of the token that stands for no answer, ``[CLS]`` (B,).
        offsets: Characters of the text that each token is made of (B, L, 2), -1 for all others.
        begins: Whether an answer may begin at a token (B, L).
        rows: Number of the question (B,), -1 for a window that only fills up a process's share.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    null: Tensor
    offsets: Tensor
    begins: Tensor
    rows: Tensor


class Window(NamedTuple):
    """A window before it is padded; see `SpanBatch`."""

    joined: tuple[np.ndarray, np.ndarray]
    positions: np.ndarray
    null: int
    offsets: np.ndarray
    begins: np.ndarray
    row: int


def windows(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Return the first token of each window over a text, and the one after its last.

    Args:
        length: Tokens of the text.
        room: Tokens of a window.
        stride: Tokens between the beginnings of windows.

    Examples:
        >>> windows(10, room=6, stride=3)
        [(0, 6), (3, 9), (6, 10)]
    """
    found = [(0, min(length, room))]
    while found[-1][1] < length:
        begin = found[-1][0] + stride
        found.append((begin, min(length, begin + room)))
    return found


def best_window(length: int, places: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return for each token (L,) the first window that shows most around it, on the side where it shows less.

    A hundredth of a window's length is added, as in BERT's code, so that of equals the longer wins.
    """
    scores = np.full((len(places), length), -np.inf)
    for score, (begin, end) in zip(scores, places, strict=True):
        tokens = np.arange(begin, end)
        score[begin:end] = np.minimum(tokens - begin, end - 1 - tokens) + 0.01 * (end - begin)
    found: np.ndarray = scores.argmax(axis=0)
    return found


def token_span(offsets: np.ndarray, begin: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token that holds a character of a stretch of text, or ``None``.

    Args:
        offsets: Characters of each token (L, 2).
        begin: First character of the stretch.
        end: The one after its last.
    """
    first = int(np.searchsorted(offsets[:, 1], begin, side="right"))
    last = int(np.searchsorted(offsets[:, 0], end, side="left")) - 1
    return (first, last) if first <= last else None


class SpanFeatures(Dataset[Window]):
    """All windows of questions over their texts, by number or by `SampleKey`.

    Args:
        questions: The questions; texts that several share are tokenized once.
        encoder: What tokenizes.
        max_length: Tokens of an input.
        document_stride: Tokens between the beginnings of windows.
        max_query_length: Tokens of a question, which is cut there.

    Raises:
        ValueError: A window beside the longest question would be shorter than the stride.
    """

    takes_sample_keys = True

    def __init__(
        self,
        questions: Sequence[Question],
        encoder: PairEncoder,
        max_length: int = 512,
        document_stride: int = 128,
        max_query_length: int = 64,
    ) -> None:
        self.questions, self.encoder = questions, encoder
        numbers = {text: number for number, text in enumerate(dict.fromkeys(each.context for each in questions))}
        self._contexts = encoder.encode(list(numbers), "tokenizing texts")
        self._context = [numbers[each.context] for each in questions]
        asked = encoder.encode([each.text.strip() for each in questions], "tokenizing questions")
        self._asked = [tokens.ids[:max_query_length] for tokens in asked]
        longest = max(map(len, self._asked))
        taken = longest + encoder.specials(pair=True)
        if max_length - taken < document_stride:
            raise ValueError(
                f"max_length must hold document_stride tokens beside the longest question's {longest} and "
                f"{taken - longest} special ones, got {max_length} for {document_stride} + {taken}"
            )
        self._places: list[list[tuple[int, int]]] = []
        self._spans: list[tuple[int, int] | None] = []
        for row, question in enumerate(questions):
            tokens = self._tokens(row)
            room = max_length - encoder.specials(pair=True) - len(self._asked[row])
            self._places.append(windows(len(tokens.ids), room, document_stride))
            begin = question.begin
            found = None if begin < 0 else token_span(tokens.offsets, begin, begin + len(question.answers[0]))
            self._spans.append(found)
        self._features = [(row, number) for row, places in enumerate(self._places) for number in range(len(places))]

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, key: int | SampleKey) -> Window:
        index, _, padding = key if isinstance(key, SampleKey) else (key, 0, False)
        row, number = self._features[index]
        tokens, places, asked = self._tokens(row), self._places[row], self._asked[row]
        begin, end = places[number]
        joined = self.encoder.join(asked, tokens.ids[begin:end])
        ids = joined[0]
        null = int(np.flatnonzero(ids == self.encoder.tokenizer.cls_token_id)[0])
        first = self.encoder.begin_of_second(len(asked))
        offsets = np.full((len(ids), 2), -1, np.int64)
        offsets[first : first + end - begin] = tokens.offsets[begin:end]
        begins = np.zeros(len(ids), bool)
        begins[first : first + end - begin] = best_window(len(tokens.ids), places)[begin:end] == number
        span = self._spans[row]
        inside = span is not None and begin <= span[0] and span[1] < end
        positions = np.asarray(span) - begin + first if inside else np.asarray([null, null])
        return Window(joined, positions, null, offsets, begins, -1 if padding else row)

    def collate(self, samples: Sequence[Window]) -> SpanBatch:
        """Return a padded batch."""
        inputs = self.encoder.inputs([each.joined for each in samples])
        width = inputs["input_ids"].shape[1]
        shifts = torch.tensor([self.encoder.shift(len(each.joined[0]), width) for each in samples])
        positions = torch.from_numpy(np.stack([each.positions for each in samples]))
        return SpanBatch(
            inputs,
            positions + shifts[:, None],
            torch.tensor([each.null for each in samples]) + shifts,
            self.encoder.pad([each.offsets for each in samples], -1),
            self.encoder.pad([each.begins for each in samples], False),
            torch.tensor([each.row for each in samples]),
        )

    def _tokens(self, row: int) -> Tokens:
        return self._contexts[self._context[row]]


def best_spans(logits: Tensor, batch: SpanBatch, max_answer_length: int) -> Tensor:
    """Return the best answer of each window.

    Of all pairs of a token where an answer may begin and one of the text that is not before it and less than
    ``max_answer_length`` behind it, the one with the largest sum of start and end logits.

    Args:
        logits: Start and end logits (B, L, 2).
        batch: The windows.
        max_answer_length: Tokens of an answer, at most.

    Returns:
        (B, 5): the question's number, the sum at the null position, the best sum (minus infinity without a pair), and
        the answer's first character in the text and the one after its last.
    """
    starts, ends = logits.float().unbind(dim=-1)
    each = torch.arange(len(logits), device=logits.device)
    null = starts[each, batch.null] + ends[each, batch.null]
    starts = starts.masked_fill(~batch.begins, -torch.inf)
    ends = ends.masked_fill(batch.offsets[..., 0] < 0, -torch.inf)
    behind = F.pad(ends, (0, max_answer_length - 1), value=-torch.inf).unfold(1, max_answer_length, 1)
    best, place = (starts[..., None] + behind).flatten(1).max(dim=1)
    first, more = place // max_answer_length, place % max_answer_length
    last = (first + more).clamp_max(starts.shape[1] - 1)
    begin, end = batch.offsets[each, first, 0], batch.offsets[each, last, 1]
    return torch.stack([batch.rows.float(), null, best, begin.float(), end.float()], dim=1)


def answers(spans: Any, questions: Sequence[Question]) -> tuple[list[int], list[str], np.ndarray]:
    """Return the best answer to each question over all its windows.

    Args:
        spans: What `best_spans` returned of the windows of some questions (N, 5).
        questions: All questions.

    Returns:
        The numbers of these questions; the texts; and by how much the null score, the least of a question's windows, is
        above the answer's.
    """
    table = np.asarray(spans, np.float32)  # the odds, too, so that a threshold among them fits a checkpoint's buffer
    table = table[np.lexsort((-table[:, 2], table[:, 0]))]
    rows, first = np.unique(table[:, 0].astype(np.int64), return_index=True)
    odds = np.minimum.reduceat(table[:, 1], first) - table[first, 2]
    places = table[first, 3:].astype(np.int64)
    texts = [
        questions[row].context[begin:end].strip() if begin >= 0 else ""
        for row, (begin, end) in zip(rows.tolist(), places.tolist(), strict=True)
    ]
    return rows.tolist(), texts, odds
