"""Parameter groups of the official code: decay kernels only, and smaller steps for lower layers."""

import re
from typing import Any

from torch import nn

_KERNELS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), ("weight",)),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def param_groups(model: nn.Module, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Group trainable parameters for an optimizer that decays weights.

    Only kernels of linear and convolutional layers are decayed, as in ``big_vision``; biases, norms, positions, the
    class token and a mask token get ``weight_decay`` 0. A rule by number of dimensions would decay the last three,
    which are 3-D. With ``layer_decay`` below 1 a group also carries ``lr_scale``, which `scale_learning_rates`
    applies: the head learns at the full rate, block i of L at ``layer_decay ** (L - i)``, the patch embedding and
    positions at ``layer_decay ** (L + 1)`` (Bao et al. 2022, BEiT, appendix).

    Args:
        model: Network, or module that holds one; layers are read from names ``blocks.i`` and ``patch_embed``.
        layer_decay: Factor from each layer to the one below, in (0, 1].

    Raises:
        ValueError: ``layer_decay`` is outside (0, 1], or is below 1 and the model has no ``blocks.i``.

    Examples:
        >>> from torch import nn
        >>> [(len(g["params"]), g.get("weight_decay")) for g in param_groups(nn.Linear(3, 2))]
        [(1, None), (1, 0.0)]
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
    kernels = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for kind, names in _KERNELS.items()
        if isinstance(module, kind)
        for name in names
    }
    # A hybrid's convolutional stem numbers blocks of its own, below patch_embed.
    names = [name for name, _ in model.named_parameters() if not _STEM.search(name)]
    depth = 1 + max((int(match[1]) for name in names if (match := _BLOCK.search(name))), default=-1)
    if layer_decay < 1.0 and not depth:
        raise ValueError(f"layer_decay must be 1 for a model without parameters named blocks.i, got {layer_decay}")
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer(name, depth) if layer_decay < 1.0 else depth + 1
        decayed = name in kernels
        if (layer, decayed) not in groups:
            group: dict[str, Any] = {"params": []}
            if not decayed:
                group["weight_decay"] = 0.0
            if layer_decay < 1.0:
                group["lr_scale"] = layer_decay ** (depth + 1 - layer)
            groups[layer, decayed] = group
        groups[layer, decayed]["params"].append(parameter)
    return list(groups.values())


def scale_learning_rates(groups: list[dict[str, Any]]) -> None:
    """Multiply each group's ``lr`` by its ``lr_scale``, once the optimizer has filled ``lr`` in."""
    for group in groups:
        group["lr"] *= group.get("lr_scale", 1.0)


_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_STEM = re.compile(r"(?:^|\.)(patch_embed|cls_token|pos_embed|mask_token)")


def _layer(name: str, depth: int) -> int:
    """Number the layers from the input: 0 the patch embedding, i + 1 block i, L + 1 whatever follows the blocks."""
    if _STEM.search(name):
        return 0
    match = _BLOCK.search(name)
    return int(match[1]) + 1 if match else depth + 1
