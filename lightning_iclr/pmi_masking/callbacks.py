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
    units_by_length,
)
from lightning_iclr.pmi_masking.pictures import (
    MaskedText,
    draw_loss_by_unit,
    draw_masked_paragraph,
    draw_unit_lengths,
)
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


class UnitLengths(Callback):
    """Draw how long units are, and at what rate those of each length are chosen, when training starts.

    The picture is ``unit_lengths.png``, over the first training rows; the rates of the run's own masking are logged,
    too, as ``units/chosen_1`` and so on: shares of the units of so many tokens. Random spans have none, since what is
    not chosen is no span.

    Args:
        rows: Rows to look at.
        longest: Tokens of the last length, which includes all longer ones.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(self, rows: int = 1000, longest: int = 10) -> None:
        for name, number in (("rows", rows), ("longest", longest)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.rows, self.longest = rows, longest

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        own, rows = data.collator, data.rows["train"]
        probability = own.mlm_probability(0) if callable(own.mlm_probability) else own.mlm_probability
        words = WholeWordCollator(data.tokenizer, seed=data.seed, mlm_probability=probability)
        maskings: dict[str, SpanMaskingCollator] = {"whole word": words}
        if not isinstance(own, (WholeWordCollator, RandomSpanCollator)):
            maskings["PMI" if isinstance(own, PMIMaskingCollator) else type(own).__name__] = own
        examples = [rows[row] for row in range(min(self.rows, len(rows)))]
        units = {name: units_by_length(collator, examples, self.longest) for name, collator in maskings.items()}
        show(draw_unit_lengths(units, probability), "unit_lengths", trainer)
        if not isinstance(own, RandomSpanCollator):
            there, chosen = list(units.values())[-1]
            shares = {f"units/chosen_{n}": float(chosen[n - 1] / there[n - 1]) for n in np.flatnonzero(there) + 1}
            for logger in trainer.loggers:
                logger.log_metrics(shares, step=trainer.global_step)


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
