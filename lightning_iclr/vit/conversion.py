"""Turn the state dicts of other libraries' Vision Transformers into ours, and ours into theirs.

``naming.py`` holds what each library calls the weights. Our names are timm's, so timm's dicts are converted as they
are, but for two details: hybrids without stages, and positions without a row for the class token.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_iclr.vit.naming import (
    BIG_VISION,
    HUGGING_FACE,
    HUGGING_FACE_4,
    VIT_JAX,
    Names,
    from_flax,
    fuse,
    split_names,
    to_flax,
    unfuse,
)
from lightning_iclr.vit.positions import Grid

Source = Literal["auto", "npz", "timm", "hf"]
OfficialLayout = Literal["vit_jax", "big_vision", "big_vision_scan"]

_ROOT = tuple(f"patch_embed.backbone.stem.{leaf}" for leaf in ("conv.weight", "norm.weight", "norm.bias"))
_STACK = "Transformer/encoderblock/"
_INLINED_POOL = ("probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/")


class Conversion(NamedTuple):
    """Weights by our names, and what could not be converted.

    Attributes:
        weights: Weights by our names.
        unexpected: Names in the source that no weight of ours has.
        broken: Split names of queries, keys or values that are missing or of another shape than their sisters.
        names: How the source calls its weights; ``None`` where it uses ours.
        num_heads: Numbers of heads of the source's attentions; empty where they cannot be seen.
    """

    weights: dict[str, Tensor]
    unexpected: list[str]
    broken: list[str]
    names: Names | None
    num_heads: set[int]

    def describe(self, name: str) -> str:
        """Our name, followed by the source's where that differs."""
        theirs = [self.names.theirs(part) or part for part in split_names(name)] if self.names else []
        return f"{name} ({', '.join(theirs)})" if theirs else name


def convert_state_dict(
    state_dict: Mapping[str, Any], source: Source = "auto", grid: Grid | None = None
) -> dict[str, Tensor]:
    """Turn a checkpoint's weights into a state dict with our names.

    Understood are the official arrays (``vit_jax``, ``big_vision``, stacked blocks), timm's names, and Hugging Face's
    of versions 4 and 5, with or without the prefix ``vit.``. Hugging Face's pooler becomes ``pre_logits``.

    ``big_vision`` and some of timm's models add no position to the class token; it gets a row of zeros.

    Args:
        state_dict: Tensors or arrays by name.
        source: Where it comes from; ``auto`` tells by the names.
        grid: Rows and columns of patches. Needed only with a class token and a grid that is not square, to tell
            whether the position embedding has a row for the class token.

    Raises:
        ValueError: Names that are unknown, queries, keys and values that do not match, or an unknown ``source``.
        TypeError: A value that is no tensor.

    Examples:
        >>> weights = convert_state_dict({"vit.layers.0.mlp.fc1.bias": torch.zeros(4)})
        >>> list(weights)
        ['blocks.0.mlp.fc1.bias']
    """
    conversion = convert(state_dict, source, grid)
    problems = [f"unexpected: {name}" for name in conversion.unexpected]
    problems += [f"missing or of another shape: {conversion.describe(name)}" for name in conversion.broken]
    if problems:
        raise ValueError("the state dict cannot be converted:\n  " + "\n  ".join(problems))
    return conversion.weights


def convert(
    state_dict: Mapping[str, Any], source: Source = "auto", grid: Grid | None = None, network_grid: Grid | None = None
) -> Conversion:
    """Convert like `convert_state_dict`, collecting what does not fit instead of raising.

    Without ``grid``, the checkpoint's patches may be a square or those of ``network_grid``.

    Raises:
        ValueError: As in `convert_state_dict`, or both are possible, one with a position for the class token and one
            without.
    """
    source = detect_source(state_dict, source)
    tensors = {name: as_tensor(name, value) for name, value in state_dict.items()}
    if source == "npz":
        conversion = _convert_official(tensors)
    elif source == "hf":
        conversion = _convert_hugging_face(tensors)
    else:
        root_alone = {name.replace("patch_embed.backbone.stem.", "patch_embed.backbone."): name for name in _ROOT}
        weights = {root_alone.get(name, name): tensor for name, tensor in tensors.items()}
        conversion = Conversion(weights, [], [], None, set())
    _add_class_row(conversion.weights, grid, network_grid, state_dict)
    return conversion


def detect_source(state_dict: Mapping[str, Any], source: Source = "auto") -> Literal["npz", "timm", "hf"]:
    """Tell by its names where a state dict comes from; a ``source`` other than ``auto`` is taken at its word.

    Raises:
        ValueError: An unknown ``source``, or names that none of the libraries uses.
    """
    if source not in get_args(Source):
        raise ValueError(f"source must be one of {', '.join(map(repr, get_args(Source)))}, got {source!r}")
    if source != "auto":
        return source
    if any("/" in name for name in state_dict):
        return "npz"
    if any(re.match(r"(vit\.)?(embeddings\.|(encoder\.)?layers?\.\d+\.)", name) for name in state_dict):
        return "hf"
    if any(name.startswith(("patch_embed.", "blocks.")) for name in state_dict):
        return "timm"
    raise ValueError(
        "cannot tell the source of a state dict with neither the official code's, timm's nor Hugging Face's names; "
        f"got {sorted(state_dict)[:5]}"
    )


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our state dict for timm's ``VisionTransformer``.

    Without a class token, timm computes the same with ``class_token=False, fc_norm=False`` and ``global_pool="avg"``
    or ``"map"``; its GELU and ours must be the same kind.

    Raises:
        ValueError: The network has a hidden tanh layer, which timm does not know.
    """
    if "pre_logits.weight" in state_dict:
        raise ValueError("timm has no hidden tanh layer: state_dict must not hold pre_logits")
    has_stages = any(name.startswith("patch_embed.backbone.stages.") for name in state_dict)
    return {
        name if has_stages or name not in _ROOT else name.replace("backbone.stem.", "backbone."): tensor
        for name, tensor in state_dict.items()
    }


def to_hf(state_dict: Mapping[str, Tensor], version: Literal[4, 5] = 5) -> dict[str, Tensor]:
    """Rename our state dict for Hugging Face's ``ViTForImageClassification``, or ``ViTModel`` if it has no head.

    Set ``layer_norm_eps=1e-6`` in the config, and ``hidden_act="gelu_pytorch_tanh"`` for the official code's GELU.

    Args:
        state_dict: Weights of a network with a class token, learned or fixed positions, and no convolutional stem.
        version: Major version of transformers whose names are wanted; 5 reads both through ``from_pretrained``.

    Raises:
        ValueError: Hugging Face's ViT has no place for a weight, or needs one that is missing.
    """
    if version not in (4, 5):
        raise ValueError(f"version must be 4 or 5, got {version}")
    names = HUGGING_FACE if version == 5 else HUGGING_FACE_4
    has_head = "head.weight" in state_dict
    missing = {"cls_token", "pos_embed"} - state_dict.keys()
    if missing:
        raise ValueError(f"Hugging Face's ViT needs a class token and positions; state_dict lacks {sorted(missing)}")
    if has_head and "pre_logits.weight" in state_dict:
        raise ValueError("Hugging Face's classifier has no hidden tanh layer: state_dict must not hold pre_logits")
    renamed = {}
    for name, tensor in unfuse(state_dict).items():
        theirs = names.theirs(name)
        if theirs is None:
            raise ValueError(f"Hugging Face's ViT has no weight like {name}")
        renamed[theirs if name.startswith("head.") or not has_head else f"vit.{theirs}"] = tensor
    return renamed


def to_official(
    state_dict: Mapping[str, Tensor], num_heads: int, layout: OfficialLayout = "vit_jax"
) -> dict[str, NDArray[Any]]:
    """Turn our state dict into the official code's arrays, to be written by ``numpy.savez``.

    ``big_vision`` adds no position to the class token, so its ``cls`` is the sum of ours and its position.

    Args:
        state_dict: Weights by our names.
        num_heads: Heads of every attention; the official arrays keep them apart.
        layout: Names and nesting; ``big_vision_scan`` stacks the blocks on axis 0.

    Raises:
        ValueError: An unknown ``layout``, ``num_heads`` that does not divide the width, or a weight that the layout
            has no place for: attention pooling in ``vit_jax``, a convolutional stem in ``big_vision``.

    Examples:
        >>> arrays = to_official({"blocks.0.attn.qkv.bias": torch.zeros(24)}, num_heads=2)
        >>> arrays["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/bias"].shape
        (2, 4)
    """
    if layout not in get_args(OfficialLayout):
        raise ValueError(f"layout must be one of {', '.join(map(repr, get_args(OfficialLayout)))}, got {layout!r}")
    weights = dict(state_dict)
    names = VIT_JAX if layout == "vit_jax" else BIG_VISION
    foreign = "attn_pool." if layout == "vit_jax" else "patch_embed.backbone."
    if layout != "vit_jax" and "cls_token" in weights and "pos_embed" in weights:
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    arrays = {}
    for name, tensor in unfuse(weights).items():
        theirs = names.theirs(name)
        if theirs is None or name.startswith(foreign):
            raise ValueError(f"the layout {layout!r} has no weight like {name}")
        if re.search(r"\battn\.q\.", name) and (num_heads < 1 or len(tensor) % num_heads):
            raise ValueError(f"num_heads must divide the width {len(tensor)}, got {num_heads}")
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        arrays[theirs] = to_flax(name, tensor, num_heads).numpy()
    return _stack_blocks(arrays) if layout == "big_vision_scan" else arrays


def as_tensor(name: str, value: object) -> Tensor:
    """Return a weight as a tensor.

    Raises:
        TypeError: It is neither a tensor nor an array.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a tensor or an array, got {type(value).__name__}")
    if value.dtype == np.dtype("V2"):  # how numpy reads back the bfloat16 that JAX writes
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def _convert_official(arrays: dict[str, Tensor]) -> Conversion:
    arrays = _normalise(arrays)
    names = (VIT_JAX, BIG_VISION) if any("MlpBlock_3" in name for name in arrays) else (BIG_VISION, VIT_JAX)
    split, unexpected, heads = {}, [], set()
    for name, array in arrays.items():
        ours = names[0].ours(name) or names[1].ours(name)
        if ours is None or ours in split:
            unexpected.append(name)
            continue
        if name.endswith("/query/kernel") and array.ndim == 3:
            heads.add(array.shape[1])
        try:
            split[ours] = from_flax(ours, array)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    weights, broken = fuse(split)
    return Conversion(weights, unexpected, broken, names[0], heads)


def _normalise(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo the nestings that official files come in: optimizer state around, stacked blocks, an inlined pool."""
    for prefix in ("params/", "opt/target/"):
        inside = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        arrays = inside or arrays
    if "probe" in arrays:
        arrays = {f"MAPHead_0/{n}" if n.startswith(_INLINED_POOL) else n: array for n, array in arrays.items()}
    flat = {}
    for name, array in arrays.items():
        if name.startswith(_STACK) and array.ndim:
            rest = name.removeprefix(_STACK)
            flat.update({f"Transformer/encoderblock_{i}/{rest}": row for i, row in enumerate(array)})
        else:
            flat["pos_embedding" if name == "Transformer/pos_embedding" else name] = array
    return flat


def _stack_blocks(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    stacked = {}
    blocks: dict[str, dict[int, NDArray[Any]]] = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.*)", name)
        if match is None:
            stacked[name] = array
        else:
            blocks.setdefault(match[2], {})[int(match[1])] = array
    return stacked | {f"{_STACK}{rest}": np.stack([rows[i] for i in sorted(rows)]) for rest, rows in blocks.items()}


def _convert_hugging_face(tensors: dict[str, Tensor]) -> Conversion:
    tensors = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    names = HUGGING_FACE_4 if any(name.startswith("encoder.layer.") for name in tensors) else HUGGING_FACE
    translated = {name: names.ours(name) for name in tensors}
    weights, broken = fuse({ours: tensors[name] for name, ours in translated.items() if ours is not None})
    return Conversion(weights, [name for name, ours in translated.items() if ours is None], broken, names, set())


def _add_class_row(
    weights: dict[str, Tensor], grid: Grid | None, network_grid: Grid | None, sources: Mapping[str, Any]
) -> None:
    """Give the class token a zero position where its library gives it none."""
    positions = weights.get("pos_embed")
    if positions is None or positions.ndim != 3 or "cls_token" not in weights:
        return
    if any(name.endswith(("posembed_input/pos_embedding", "embeddings.position_embeddings")) for name in sources):
        return  # these layouts always hold the row
    rows = positions.shape[1]
    known = [math.prod(one) for one in (grid or network_grid,) if one is not None]

    def fits(patches: int) -> bool:
        return patches in known or (grid is None and patches > 0 and _is_square(patches))

    if fits(rows) and fits(rows - 1):
        raise ValueError(f"pos_embed: one of its {rows} rows may be the class token's or not; pass old_grid=(h, w)")
    has_row = fits(rows - 1) or ("pos_embed" in sources and not fits(rows))
    if not has_row:
        weights["pos_embed"] = torch.cat([positions.new_zeros(1, 1, positions.shape[2]), positions], dim=1)


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
