"""Tokenizers as recipes name them, and the WordPiece that the paper trains for itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_iclr._imports import optional_import
from lightning_iclr.embedded import read_wordpiece

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def load_tokenizer(source: Any) -> Any:
    """Return a tokenizer of ``transformers``.

    Args:
        source: A tokenizer; the name or folder of one; a ``tokenizer.json`` with BERT's special tokens; or ``embedded``
            for the WordPiece that ships with this package.

    Raises:
        ValueError: It has neither all of BERT's special tokens but the unknown, nor T5's sentinels.
    """
    transformers = optional_import("transformers", "text")
    if not isinstance(source, (str, Path)):
        tokenizer = source
    elif source == "embedded":
        from tokenizers import Tokenizer

        wordpiece = Tokenizer.from_str(read_wordpiece())
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=wordpiece, **SPECIAL)
    elif Path(source).suffix == ".json":
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source), **SPECIAL)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source))
    t5 = "<extra_id_0>" in tokenizer.get_vocab()
    for name in ("pad_token", "eos_token") if t5 else ("pad_token", "cls_token", "sep_token", "mask_token"):
        if getattr(tokenizer, f"{name}_id", None) is None:
            raise ValueError(f"tokenizer must have a {name}, and {source} has none")
    return tokenizer


def train_wordpiece(texts: Iterable[str], size: int) -> Any:
    """Return an uncased WordPiece tokenizer with BERT's special tokens, trained on texts.

    Args:
        texts: What it is trained on.
        size: Pieces, special tokens included.

    Raises:
        ValueError: ``size`` leaves no room for pieces.
    """
    transformers = optional_import("transformers", "text")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if size <= len(SPECIAL):
        raise ValueError(f"size must exceed the {len(SPECIAL)} special tokens, got {size}")
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(SPECIAL.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    names = list(SPECIAL)
    begin, end = names.index("cls_token"), names.index("sep_token")  # the trainer numbers special tokens in this order
    tokenizer.post_processor = processors.BertProcessing((SPECIAL["sep_token"], end), (SPECIAL["cls_token"], begin))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
