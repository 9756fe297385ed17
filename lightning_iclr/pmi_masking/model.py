"""Networks of ``transformers`` as `MaskedLM` runs them: logits only where something is predicted, texts apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_iclr._imports import optional_import
from lightning_iclr.pmi_masking.packing import attention_mask_of, positions_of


class Masked(NamedTuple):
    """What a network says of the S tokens that are predicted.

    Attributes:
        logits: (S, V).
        labels: (S,).
        lengths: Tokens of each one's unit (S,), or ``None`` where the batch does not tell units.
    """

    logits: Tensor
    labels: Tensor
    lengths: Tensor | None


def make_network(net: nn.Module | Mapping[str, Any] | str) -> nn.Module:
    """Return a network: itself, one from scratch by settings of ``transformers``, or a pretrained one by its name.

    Raises:
        ValueError: The settings lack ``model_type``.
    """
    if isinstance(net, nn.Module):
        return net
    transformers = optional_import("transformers", "text")
    if isinstance(net, str):
        loaded: nn.Module = transformers.AutoModelForMaskedLM.from_pretrained(net)
        return loaded.train()  # else it stays in evaluation mode, and its dropout does nothing
    settings = dict(net)
    if "model_type" not in settings:
        raise ValueError(f"net must have a model_type, such as bert, got {', '.join(settings)}")
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    made: nn.Module = transformers.AutoModelForMaskedLM.from_config(config)
    return made


def run_at(net: nn.Module, batch: Mapping[str, Tensor], sparse: bool) -> Masked:
    """Run a network on a batch and return what it says where something is predicted.

    Args:
        net: A masked language model of ``transformers``, or any that takes ``input_ids`` and ``attention_mask`` and
            returns ``logits``.
        batch: ``input_ids``, ``labels``, ``attention_mask``, and where there are any ``token_type_ids``,
            ``document_ids`` and ``unit_ids``, each (B, L).
        sparse: Whether the head sees these tokens only: a third of the work and a sixth of the memory of a small model
            with a large vocabulary.
    """
    labels = batch["labels"]
    rows, columns = torch.nonzero(labels != -100, as_tuple=True)
    inputs: dict[str, Any] = {
        name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch
    }
    if "document_ids" in batch:
        inputs["attention_mask"] = attention_mask_of(batch["document_ids"])
        inputs["position_ids"] = positions_of(batch["document_ids"]) + _first_position(net)
    base = getattr(net, "base_model", None)
    if sparse and isinstance(base, nn.Module) and base is not net:
        # The head works on each token by itself, so it may as well see the chosen ones as one short text.
        def keep(module: nn.Module, arguments: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[rows, columns][None]
            return output

        handle = base.register_forward_hook(keep)
        try:
            logits = net(**inputs).logits[0]
        finally:
            handle.remove()
    else:
        logits = net(**inputs).logits[rows, columns]
    lengths = _unit_lengths(batch["unit_ids"])[rows, columns] if "unit_ids" in batch else None
    return Masked(logits, labels[rows, columns], lengths)


def param_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Return two groups of parameters: matrices, which decay, and biases and norms, which do not, as in BERT."""

    def named(decays: bool) -> Iterable[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in net.named_parameters() if p.requires_grad and (p.ndim > 1) == decays)

    return [{"params": [p for _, p in named(True)]}, {"params": [p for _, p in named(False)], "weight_decay": 0.0}]


def _first_position(net: nn.Module) -> int:
    """Return the position of a text's first token: RoBERTa's come after that of its padding."""
    tables = (part for name, part in net.named_modules() if name.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def _unit_lengths(units: Tensor) -> Tensor:
    """Return the tokens of each token's unit (B, L), from the number of its unit in its row, -1 for none."""
    counts = torch.zeros(len(units), units.shape[1] + 1, dtype=torch.long, device=units.device)
    counts.scatter_add_(1, units + 1, torch.ones_like(units))
    return counts.gather(1, units + 1)
