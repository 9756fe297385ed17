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
        loaded: nn.Module = _auto_class(transformers.AutoConfig.from_pretrained(net)).from_pretrained(net)
        return loaded.train()  # else it stays in evaluation mode, and its dropout does nothing
    settings = dict(net)
    if "model_type" not in settings:
        raise ValueError(f"net must have a model_type, such as bert, got {', '.join(settings)}")
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    made: nn.Module = _auto_class(config).from_config(config)
    return made


def is_encoder_decoder(net: nn.Module) -> bool:
    """Whether a network writes targets of its own, as T5 does, and not tokens in the place of masks."""
    return bool(getattr(getattr(net, "config", None), "is_encoder_decoder", False))


def run_at(net: nn.Module, batch: Mapping[str, Tensor], sparse: bool) -> Masked:
    """Run a network on a batch and return what it says where something is predicted.

    Args:
        net: A masked language model of ``transformers``, or any that takes ``input_ids`` and ``attention_mask`` and
            returns ``logits``; or a model with a decoder, for batches of sentinels.
        batch: ``input_ids``, ``labels``, ``attention_mask``, and where there are any ``token_type_ids``,
            ``document_ids`` and ``unit_ids``, each (B, L).
        sparse: Whether the head sees these tokens only: a third of the work and a sixth of the memory of a small model
            with a large vocabulary.
    """
    labels = batch["labels"]
    if is_encoder_decoder(net):
        output = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
        return Masked(output.logits[labels != -100], labels[labels != -100], None)
    rows, columns = torch.nonzero(labels != -100, as_tuple=True)
    inputs: dict[str, Any] = {
        name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch
    }
    if "document_ids" in batch:
        inputs["attention_mask"] = _mask_for(net, attention_mask_of(batch["document_ids"]))
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


def repeated_layers(net: nn.Module) -> list[nn.Module]:
    """Return the layers that a network repeats, in their order: what is sharded and gathered one by one."""
    found: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, part in net.named_modules():
        if isinstance(part, nn.ModuleList) and not name.startswith(inside or "\0"):
            found += list(part)
            inside += (f"{name}.",)
    return found


def _mask_for(net: nn.Module, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """Return which tokens each one attends to (B, 1, L, L) as a network of ``transformers`` wants to be told."""
    config: Any = getattr(net, "config", None)
    if getattr(config, "_attn_implementation", None) == "eager":  # which adds it to the scores
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    place = torch.arange(mask.shape[-1], device=mask.device)
    far = (place[:, None] - place).abs() > config.sliding_window
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return {"full_attention": mask, "sliding_attention": mask.masked_fill(far, blocked)}


def _auto_class(config: Any) -> Any:
    transformers = optional_import("transformers", "text")
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForMaskedLM


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
