"""Inputs of one text or two, written with the special tokens that a tokenizer writes and cut where the task wants."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_iclr.pmi_masking.tokenizers import load_tokenizer

_BATCH = 1000  # texts that are tokenized at once


class Tokens(NamedTuple):
    """A text's tokens.

    Attributes:
        ids: (L,).
        offsets: Where each lies in the text (L, 2), in characters: its begin and its end.
    """

    ids: np.ndarray
    offsets: np.ndarray


class _Template(NamedTuple):
    """Special tokens before, between and after the texts, and the types of all five parts."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: list[int]


class PairEncoder:
    """Tokenize texts, and join one or two of them as the tokenizer would: ``[CLS] first [SEP] second [SEP]`` for BERT.

    A tokenizer that adds no special tokens of its own writes them as BERT does, which is also how
    `MaskedTextDataModule` packs texts.

    Args:
        tokenizer: Whatever `load_tokenizer` takes.

    Raises:
        ValueError: The tokenizer is one in Python, which does not know where its tokens lie in a text, or has, as T5's,
            no special tokens to join texts with.

    Examples:
        >>> encoder = PairEncoder("embedded")
        >>> first, second = encoder.encode(["new york", "is big"])
        >>> encoder.tokenizer.convert_ids_to_tokens(encoder.join(first.ids, second.ids)[0])
        ['[CLS]', 'new', 'york', '[SEP]', 'is', 'big', '[SEP]']
    """

    def __init__(self, tokenizer: Any) -> None:
        loaded = load_tokenizer(tokenizer)
        if not loaded.is_fast:
            raise ValueError(
                f"tokenizer must be a fast one, which knows where tokens lie in a text, got {type(loaded).__name__}; "
                "transformers converts most with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        for name in ("cls_token", "sep_token"):
            if getattr(loaded, f"{name}_id", None) is None:
                raise ValueError(f"tokenizer must have a {name} to join texts with, and {tokenizer} has none")
        self.tokenizer = loaded if loaded.num_special_tokens_to_add(pair=True) else _with_specials(loaded)
        self._templates = {pair: self._template(pair) for pair in (False, True)}

    def encode(self, texts: Sequence[str], title: str = "tokenizing") -> list[Tokens]:
        """Return the tokens of each text, uncut and without special ones."""
        found: list[Tokens] = []
        with tqdm(total=len(texts), desc=title, unit="text", disable=len(texts) < 20 * _BATCH) as bar:
            for begin in range(0, len(texts), _BATCH):
                batch = list(texts[begin : begin + _BATCH])
                encoded = self.tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                found += [
                    Tokens(np.asarray(ids, np.int32), np.asarray(offsets, np.int32).reshape(-1, 2))
                    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                ]
                bar.update(len(batch))
        return found

    def specials(self, pair: bool) -> int:
        """Return the number of special tokens around one text or two."""
        template = self._templates[pair]
        return len(template.before) + len(template.between) + len(template.after)

    def begin_of_second(self, first: int) -> int:
        """Return the place of a second text's first token, behind a first text of so many tokens."""
        template = self._templates[True]
        return len(template.before) + first + len(template.between)

    def join(self, first: np.ndarray, second: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens (L,) of an input of one text or two, and their types (L,)."""
        before, between, after, types = self._templates[second is not None]
        texts = [before, first, between, [] if second is None else second, after]
        parts = [np.asarray(part, np.int64) for part in texts]
        ids = np.concatenate(parts)
        return ids, np.repeat(np.asarray(types), [len(part) for part in parts])

    def pad(self, rows: Sequence[np.ndarray], value: int) -> Tensor:
        """Stack rows of tokens, or of what belongs to them, on the side that the tokenizer pads."""
        width = max(len(row) for row in rows)
        padded = np.full((len(rows), width, *rows[0].shape[1:]), value, rows[0].dtype)
        for place, row in enumerate(rows):
            begin = self.shift(len(row), width)
            padded[place, begin : begin + len(row)] = row
        return torch.from_numpy(padded)

    def shift(self, length: int, width: int) -> int:
        """Return how many places padding moves the tokens of a row of this length."""
        return width - length if self.tokenizer.padding_side == "left" else 0

    def inputs(self, joined: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
        """Return the padded batch of what `join` returned: tokens, attention and types, each (B, L)."""
        ids = [ids for ids, _ in joined]
        return {
            "input_ids": self.pad(ids, self.tokenizer.pad_token_id),
            "attention_mask": self.pad([np.ones_like(row) for row in ids], 0),
            "token_type_ids": self.pad([types for _, types in joined], 0),
        }

    def _template(self, pair: bool) -> _Template:
        probe = self.tokenizer("a", "a" if pair else None, return_token_type_ids=True)
        texts = [-1 if number is None else number for number in probe.sequence_ids(0)]
        ids, types = probe["input_ids"], probe["token_type_ids"]
        last = 1 if pair else 0
        begin, end = texts.index(0), len(texts) - texts[::-1].index(last)
        first_end = len(texts) - texts[::-1].index(0)
        second = texts.index(1) if pair else end
        kinds = [types[:begin], types[begin:first_end], types[first_end:second], types[second:end], types[end:]]
        return _Template(ids[:begin], ids[first_end:second], ids[end:], [kind[0] if kind else 0 for kind in kinds])


def _with_specials(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    begin, end = own.cls_token, own.sep_token
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0",
        pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(begin, own.cls_token_id), (end, own.sep_token_id)],
    )
    return own
