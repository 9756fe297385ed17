"""Pictures that a run of masked language modelling leaves behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_iclr.figures import show
from lightning_iclr.pmi_masking.collator import (
    PMIMaskingCollator,
    RandomTokenCollator,
    SpanMaskingCollator,
    WholeWordCollator,
    unit_ids,
)
from lightning_iclr.pmi_masking.pictures import MaskedText, draw_loss_by_unit, draw_masked_paragraph
from lightning_iclr.pmi_masking.spans import RandomSpanCollator


class MaskedParagraph(Callback):
    """Draw the beginning of the training texts under each masking, when training starts: ``masked_paragraph.png``.

    Args:
        tokens: Tokens to draw.

    Raises:
        ValueError: ``tokens`` is below 1.
    """

    def __init__(self, tokens: int = 120) -> None:
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.tokens = tokens

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        own, tokenizer, rows = data.collator, data.tokenizer, data.rows["train"]
        others = {
            "random token": RandomTokenCollator(tokenizer, seed=data.seed),
            "whole word": WholeWordCollator(tokenizer, seed=data.seed),
            "random span": RandomSpanCollator(tokenizer, seed=data.seed),
        }
        if isinstance(own, PMIMaskingCollator):
            others["PMI"] = own
        ids: list[int] = []
        documents: list[int] = []
        for row in range(len(rows)):
            example = rows[row]
            text = example["document_ids"] >= 0
            ids += example["input_ids"][text].tolist()
            documents += (example["document_ids"][text] + len(documents)).tolist()
            if len(ids) >= self.tokens:
                break
        example = {"input_ids": ids[: self.tokens], "document_ids": documents[: self.tokens], "row_id": 0, "epoch": 0}
        texts = {name: masked_text(collator, example) for name, collator in others.items()}
        show(draw_masked_paragraph(texts), "masked_paragraph", trainer)


class LossByUnit(Callback):
    """Draw the training loss by the length of units over steps, when training ends: ``loss_by_unit.png``.

    Attributes:
        steps: Steps at which there were losses.
        losses: Nats a token at these, by length.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: dict[str, list[float]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if not every or trainer.global_step % every or (self.steps and self.steps[-1] == trainer.global_step):
            return
        prefix = "train/loss_unit_"
        found = {name.removeprefix(prefix): value for name, value in trainer.logged_metrics.items() if prefix in name}
        if found:
            self.steps.append(trainer.global_step)
            for name, value in found.items():
                before = [float("nan")] * (len(self.steps) - 1)
                self.losses.setdefault(name, before).append(float(value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(self.steps) > 1:
            defined = {name: values for name, values in self.losses.items() if np.isfinite(values).any()}
            show(draw_loss_by_unit(self.steps, defined), "loss_by_unit", trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": torch.tensor(self.steps), "losses": {n: torch.tensor(v) for n, v in self.losses.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"].tolist()
        self.losses = {name: values.tolist() for name, values in state_dict["losses"].items()}


def masked_text(collator: SpanMaskingCollator, example: dict[str, Any]) -> MaskedText:
    """Return one example as a masking sees it, for `draw_masked_paragraph`."""
    rows, selection = collator.plan([example])
    units = unit_ids(rows, selection)[0]
    chosen = np.zeros(rows.tokens.size, bool)
    chosen[selection.place] = selection.chosen[selection.unit]
    tokenizer = collator.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(rows.tokens[0].tolist())
    keep = [place for place, number in enumerate(rows.tokens[0].tolist()) if number not in tokenizer.all_special_ids]
    pieces = []
    for place in keep:
        token = tokens[place]
        continues = token.startswith("##")
        spelt = token.removeprefix("##").replace("Ġ", " ").replace("▁", " ")
        pieces.append(spelt if continues or spelt.startswith(" ") else f" {spelt}")
    return MaskedText(pieces, units[keep].tolist(), chosen[keep].tolist())
