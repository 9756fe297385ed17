"""What single tokens of a tokenizer of `transformers` spell, and what it cannot spell."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

_ASKED = 1000  # words that a tokenizer is asked for at once


def unknown_id(tokenizer: Any) -> int | None:
    """Return the id of the token that stands for what a tokenizer cannot spell; ``None`` where there is none."""
    number: int | None = getattr(tokenizer, "unk_token_id", None)
    if number is None:  # the model may have one that nobody has told transformers
        model = _plan(tokenizer).get("model") or {}
        number = model.get("unk_id")
        if number is None and model.get("unk_token"):
            number = tokenizer.get_vocab().get(model["unk_token"])
    return number


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of tokens that are no text: the special ones, and the unknown, whose spelling is not known."""
    unknown = unknown_id(tokenizer)
    return sorted({*tokenizer.all_special_ids, *([] if unknown is None else [unknown])})


def unspellable(tokenizer: Any, words: Sequence[str]) -> set[str]:
    """Return the words that a tokenizer writes with its unknown token, in whatever case."""
    unknown, found = unknown_id(tokenizer), set[str]()

    def is_known(text: str) -> bool:
        return unknown not in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    for begin in range(0, len(words) if unknown is not None else 0, _ASKED):
        asked = words[begin : begin + _ASKED]
        if not is_known(" ".join(asked)):
            found |= {word for word in asked if not any(map(is_known, (word, word.capitalize(), word.upper())))}
    return found


def cuts_unknown(tokenizer: Any) -> bool:
    """Whether the unknown token may stand for a part of a word, as in SentencePiece; WordPiece gives up on the whole.

    Bytes are all known.
    """
    plan = _plan(tokenizer)
    kinds = {part.get("type") for part in _parts(plan.get("pre_tokenizer")) + _parts(plan.get("decoder"))}
    return "ByteLevel" not in kinds and (plan.get("model") or {}).get("type") in ("Unigram", "BPE")


def _plan(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    plan: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    return plan


def token_speller(tokenizer: Any) -> Callable[[str], tuple[str | bytes, bool]]:
    """Return a function from a token to its text (bytes where characters are cut) and whether it continues a word."""
    plan = _plan(tokenizer)
    kinds = {part.get("type") for part in _parts(plan.get("pre_tokenizer")) + _parts(plan.get("decoder"))}
    model = plan.get("model") or {}
    if "ByteLevel" in kinds:
        table = _byte_characters()

        def byte_level(token: str) -> tuple[str | bytes, bool]:
            if any(character not in table for character in token):
                return token, not token[:1].isspace()  # an added token, which is not in bytes
            raw = bytes(table[character] for character in token)
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                return raw, not raw[:1].isspace()
            return text, not text[:1].isspace()

        return byte_level
    if "Metaspace" in kinds or "▁" in json.dumps(plan.get("decoder") or {}, ensure_ascii=False):

        def metaspace(token: str) -> tuple[str | bytes, bool]:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)]), True
            text = token.replace("▁", " ")
            return text, not text[:1].isspace()

        return metaspace
    prefix = model.get("continuing_subword_prefix") or "##"

    def word_piece(token: str) -> tuple[str | bytes, bool]:
        continues = token.startswith(prefix) and len(token) > len(prefix)
        return (token[len(prefix) :], True) if continues else (token, False)

    return word_piece


def _parts(part: Any) -> list[dict[str, Any]]:
    if not part:
        return []
    inner = part.get("pretokenizers") or part.get("decoders")
    return [own for each in inner for own in _parts(each)] if inner else [part]


def _byte_characters() -> dict[str, int]:
    """Return the byte of each character by which byte-level BPE writes bytes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
