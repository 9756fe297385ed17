"""Read checkpoint files of Vision Transformers and start a network from one."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_iclr.transformer import MLP
from lightning_iclr.vit.conversion import Conversion, Source, as_tensor, convert, convert_state_dict, detect_source
from lightning_iclr.vit.model import VisionTransformer
from lightning_iclr.vit.naming import fused_name
from lightning_iclr.vit.positions import Grid, ResizeMode, check_mode, resize_position_embedding, sincos2d

_HEAD = ("head", "pre_logits")
_OUR_PREFIXES = ("net.", "pretext.encoder.")  # where ViTClassifier and MaskedPatchPretraining keep the network


def load_official(path: str | Path, grid: Grid | None = None) -> dict[str, Tensor]:
    """Read an original ``.npz`` checkpoint of ``vit_jax`` or ``big_vision`` as a state dict of ours.

    Args:
        path: File; its arrays may be below ``params/`` or ``opt/target/``, blocks may be stacked on axis 0.
        grid: Rows and columns of patches, where they are no square; see `convert_state_dict`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds pickled objects, or its names are not those of the official code.
    """
    return convert_state_dict(_read_npz(Path(path)), source="npz", grid=grid)


def load_pretrained(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    source: Source | Literal["ours"] = "auto",
    reset_head: bool = False,
    position_mode: ResizeMode | None = None,
    old_grid: Grid | None = None,
) -> None:
    """Start a network from a checkpoint, all of it or not at all.

    Positions of another grid are resized (section 3.2); fixed ones are the network's own. The network is left as it
    was when anything is missing, unknown or of another shape.

    The activation of all MLPs is set to what the weights were made for: ``gelu_tanh`` for the official files,
    ``gelu`` for timm's and Hugging Face's. It stays as it is for ``ours``: checkpoints of this package's
    LightningModules, which ``auto`` recognises. A bare state dict of ours looks like timm's: pass ``source="ours"``.
    The LayerNorms' epsilon is not touched: build the network with ``norm_eps=1e-12`` to repeat Hugging Face's
    default config to the last digit; the others, and the network's default, use 1e-6.

    Args:
        model: A `VisionTransformer`.
        checkpoint: A file (``.npz``, ``.safetensors``, or ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` read without
            unpickling objects), or a state dict.
        source: Whose names the weights have; ``auto`` tells by the names.
        reset_head: Leave out the checkpoint's head and start from a new one. The hidden tanh layer goes with it
            unless the network has one of the same shape, as in the official code.
        position_mode: How to resize positions; ``None`` for ``model.position_mode``.
        old_grid: Rows and columns of the checkpoint's patches. ``None`` for a square, or the network's own grid.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: A ``.safetensors`` file and no safetensors package.
        TypeError: ``model`` is no `VisionTransformer`, or a value is no tensor.
        ValueError: The file cannot be read, or does not fit the network; the message lists every weight that does
            not.

    Examples:
        >>> sizes = {"patch_size": 4, "dim": 16, "depth": 1, "num_heads": 2}
        >>> small = VisionTransformer(image_size=8, num_classes=1000, **sizes)
        >>> large = VisionTransformer(image_size=16, num_classes=10, **sizes)
        >>> load_pretrained(large, small.state_dict(), source="ours", reset_head=True)
        >>> bool((large.blocks[0].mlp.fc1.weight == small.blocks[0].mlp.fc1.weight).all())
        True
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"model must be a VisionTransformer, got {type(model).__name__}")
    mode = position_mode or model.position_mode
    check_mode(mode)
    name = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    state_dict = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    state_dict, is_ours = _unwrap(state_dict)
    kind: Literal["npz", "timm", "hf", "ours"]
    if source == "ours" or (source == "auto" and is_ours):
        kind = "ours"
        conversion = Conversion({key: as_tensor(key, value) for key, value in state_dict.items()}, [], [], None, set())
    else:
        kind = detect_source(state_dict, source)
        conversion = convert(state_dict, kind, old_grid, model.grid)

    weights = dict(conversion.weights)
    problems = _fit_positions(model, weights, old_grid, mode)
    if conversion.num_heads - {model.num_heads}:
        problems.append(f"num_heads: expected {model.num_heads}, got {sorted(conversion.num_heads)}")
    problems += _misfits(model, conversion, weights, reset_head)
    if problems:
        raise ValueError(f"{name} does not fit the network:\n  " + "\n  ".join(problems))
    if reset_head:
        model.reset_head()
    model.load_state_dict({**model.state_dict(), **weights})
    if kind != "ours":
        for module in model.modules():
            if isinstance(module, MLP):
                module.act = nn.GELU(approximate="tanh" if kind == "npz" else "none")


def _misfits(
    model: VisionTransformer, conversion: Conversion, weights: dict[str, Tensor], reset_head: bool
) -> list[str]:
    """List what keeps ``weights`` from filling the network, after taking the old head out of them."""
    expected = model.state_dict()
    if reset_head:
        hidden = [name for name in weights if name.startswith("pre_logits.")]
        fits = all(name in expected and expected[name].shape == weights[name].shape for name in hidden)
        for name in [name for name in weights if name.startswith("head.")] + ([] if fits else hidden):
            del weights[name]
    given = {name for name in expected if name in weights}
    own = {name for name in expected if reset_head and name.startswith(tuple(f"{part}." for part in _HEAD))}
    own |= {"pos_embed"} if model.position == "sincos2d" else set()
    broken = {fused_name(name) for name in conversion.broken}
    problems = [f"missing: {conversion.describe(name)}" for name in expected if name not in given | own | broken]
    problems += [f"missing or of another shape: {conversion.describe(name)}" for name in conversion.broken]
    problems += [f"unexpected: {conversion.describe(name)}" for name in weights if name not in expected]
    problems += [f"unexpected: {name}" for name in conversion.unexpected]
    for name in expected:
        if name in given and weights[name].shape != expected[name].shape:
            shapes = f"expected {tuple(expected[name].shape)}, got {tuple(weights[name].shape)}"
            problems.append(f"shape of {conversion.describe(name)}: {shapes}")
    if any(f"{word} {part}." in problem for problem in problems for word in (":", "of") for part in _HEAD):
        problems.append("to leave out the checkpoint's head and start from a new one, pass reset_head=True")
    return problems


def _fit_positions(
    model: VisionTransformer, weights: dict[str, Tensor], old_grid: Grid | None, mode: ResizeMode
) -> list[str]:
    """Resize learned positions to the network's grid, drop fixed ones that it makes itself; return the problems."""
    positions = weights.get("pos_embed")
    prefix = int("cls_token" in weights)
    if positions is None or model.position == "none" or prefix != model.num_prefix_tokens or positions.ndim != 3:
        return []
    rows = positions.shape[1] - prefix
    grid = old_grid
    if grid is None:
        side = math.isqrt(max(rows, 0))
        candidates = {(side, side)} if rows > 0 and side**2 == rows else set()
        candidates |= {model.grid} if rows == math.prod(model.grid) else set()
        if len(candidates) != 1:
            tried = "fit no square and not" if not candidates else "fit a square as well as"
            return [f"pos_embed: its {rows} patches {tried} the network's grid {model.grid}; pass old_grid=(h, w)"]
        (grid,) = candidates
    if math.prod(grid) != rows:
        return [f"pos_embed: it has {rows} patches, but old_grid is {grid}"]
    if model.position == "learned":
        weights["pos_embed"] = resize_position_embedding(positions, grid, model.grid, prefix, mode)
        return []
    fixed = sincos2d(model.dim, grid) if positions.shape[2] == model.dim else torch.empty(0)
    if positions[0, prefix:].shape != fixed.shape or not torch.allclose(
        positions[0, prefix:].to(fixed), fixed, atol=0.02
    ):
        return ["pos_embed: the network has fixed positions (sincos2d), the checkpoint learned ones"]
    del weights["pos_embed"]
    return []


def _unwrap(checkpoint: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Find the network's weights in what training code saves around them; tell whether it was this package's."""
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    for prefix in _OUR_PREFIXES:
        inside = {name.removeprefix(prefix): value for name, value in checkpoint.items() if name.startswith(prefix)}
        if inside:
            return inside, True
    return checkpoint, False


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"checkpoint must end in .npz, .safetensors, .pt, .pth, .bin or .ckpt, got {path}")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise several kinds for a damaged file
        raise ValueError(f"{path} cannot be read as tensors; is it truncated? ({error})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a state dict, got {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors; install it with: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as tensors; is it truncated? ({error})") from error


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise several kinds for a damaged file
        raise ValueError(f"{path} is not a readable .npz archive; is it truncated? ({error})") from error
