"""What a trained Vision Transformer looks at (section 4.5 and appendix D), on ours and on foreign networks.

Shapes: L blocks, B images, H heads, N patches in a grid (h, w), T = N tokens or N + 1 with a class token first.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_iclr.transformer import Attention
from lightning_iclr.vit.positions import Grid


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the attention of every block, row by row a distribution over the tokens.

    Our blocks compute it again from their queries and keys, since fused attention keeps no map; training does not pay
    for it. A compiled network runs uncompiled here. Of other networks two kinds are understood: those of Hugging Face,
    which return ``attentions`` when loaded with ``attn_implementation="eager"``, and modules with ``qkv`` and
    ``num_heads`` as in timm's ViT.

    Args:
        model: Network; it is run as it is, so call ``eval()`` first if it has dropout.
        images: Images (B, C, H, W).

    Returns:
        L maps (B, H, T, T).

    Raises:
        ValueError: The network has no softmax attention to show.

    Examples:
        >>> from lightning_iclr.vit import VisionTransformer
        >>> net = VisionTransformer(image_size=8, patch_size=2, num_classes=3, dim=16, depth=2, num_heads=4)
        >>> [tuple(m.shape) for m in attention_maps(net, torch.zeros(1, 3, 8, 8))]
        [(1, 4, 17, 17), (1, 4, 17, 17)]
    """
    fused = fused_attentions(model)
    if not fused:
        return _returned_maps(model, images)
    maps: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda m, inputs: maps.append(_map(m, inputs[0]))) for m in fused]
    try:
        # A compiled graph may have been traced without these hooks.
        with torch.compiler.set_stance("force_eager"):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def fused_attentions(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose queries and keys `attention_maps` reads; none of a network that returns its maps.

    Raises:
        ValueError: A layer has no softmax attention.
    """
    pluggable = [m for m in model.modules() if isinstance(m, Attention) and m.attention is not None]
    if pluggable:
        kind = type(pluggable[0].attention).__name__
        raise ValueError(f"model must have softmax attention; {kind} has no attention maps")
    fused = [m for m in model.modules() if _is_fused_attention(m)]
    foreign = sorted({name for m in fused for name, _ in m.named_parameters(recurse=False)})
    if foreign:
        raise ValueError(
            f"model must have plain softmax attention; its attention layers also have {', '.join(foreign)}"
        )
    return fused


def attention_distance(maps: Sequence[Tensor], grid: Grid, patch_size: int | Grid, renormalize: bool = False) -> Tensor:
    """Measure how far each head looks: the mean distance to attended patches, weighted by attention (appendix D.7).

    Distances are Euclidean between patch centres. Queries are the patches, not the class token. The paper does not say
    what becomes of attention to the class token: as it stands it counts as distance 0.

    Args:
        maps: L maps (B, H, T, T); other networks' ``attentions`` serve as well.
        grid: Rows and columns of patches (h, w); leading tokens in excess of h w are class tokens or registers.
        patch_size: Height and width of a patch, in pixels; one number for squares.
        renormalize: Share attention to leading tokens out over the patches.

    Returns:
        Distances (L, H) in pixels, averaged over queries and images.

    Raises:
        ValueError: No maps, or maps with fewer tokens than the grid has patches.

    Examples:
        >>> looks_at_itself = torch.eye(4).expand(1, 1, 4, 4)
        >>> attention_distance([looks_at_itself], grid=(2, 2), patch_size=16)
        tensor([[0.]])
    """
    prefix = _prefix(maps, grid)
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rows, columns = torch.meshgrid(torch.arange(grid[0]) * height, torch.arange(grid[1]) * width, indexing="ij")
    centres = torch.stack([rows.flatten(), columns.flatten()], dim=1).to(torch.float64)
    # Not torch.cdist, whose matrix product loses half of the digits.
    pairs = (centres[:, None] - centres[None]).square().sum(dim=-1).sqrt()
    distances = []
    for attention in maps:
        patches = attention[:, :, prefix:, prefix:]
        if renormalize:
            patches = patches / patches.sum(dim=-1, keepdim=True)
        distances.append((patches * pairs.to(patches)).sum(dim=-1).mean(dim=(0, 2)))
    return torch.stack(distances)


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Follow attention from the input to the output through all blocks (Abnar & Zuidema 2020, section 3).

    Heads are averaged, the residual connection counts as an identity of the same weight, rows are normalised and the
    blocks' matrices multiplied.

    Args:
        maps: L maps (B, H, T, T).

    Returns:
        Row t of (B, T, T) says what the output of token t is made of.

    Raises:
        ValueError: No maps.

    Examples:
        >>> rollout([torch.eye(3).expand(1, 2, 3, 3)])[0]
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    if not maps:
        raise ValueError("maps must hold at least one block's attention, got none")
    total: Tensor | None = None
    for attention in maps:
        mean = attention.mean(dim=1)
        mixed = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        total = mixed if total is None else mixed @ total
    return cast(Tensor, total)


def position_similarity(position_embedding: Tensor, grid: Grid) -> Tensor:
    """Compare the position embedding of every patch with all others' by their cosine (figure 7, centre).

    Args:
        position_embedding: Embeddings (1, T, D) or (T, D); leading rows in excess of h w are left out.
        grid: Rows and columns of patches (h, w).

    Returns:
        Cosines (h, w, h, w).

    Raises:
        ValueError: Fewer rows than the grid has patches.

    Examples:
        >>> position_similarity(torch.randn(1, 17, 8), (4, 4)).shape
        torch.Size([4, 4, 4, 4])
    """
    rows = position_embedding.reshape(-1, position_embedding.shape[-1])
    if len(rows) < math.prod(grid):
        raise ValueError(f"position_embedding must have a row for each of {math.prod(grid)} patches, got {len(rows)}")
    patches = nn.functional.normalize(rows[len(rows) - math.prod(grid) :], dim=-1)
    cosines: Tensor = patches @ patches.T
    return cosines.view(*grid, *grid)


def patch_filters(weight: Tensor, n: int = 28) -> Tensor:
    """Return the first principal components of the patch embedding's filters (figure 7, left).

    The filters are centred over the D output features. A component's sign is arbitrary; its largest element is made
    positive.

    Args:
        weight: Kernel of the patch embedding (D, C, ph, pw).
        n: Components to return; there are at most min(D, C ph pw).

    Returns:
        Components (n, C, ph, pw) of norm 1, by falling variance.

    Raises:
        ValueError: ``n`` is below 1.

    Examples:
        >>> patch_filters(torch.randn(32, 3, 4, 4), n=5).shape
        torch.Size([5, 3, 4, 4])
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    filters = weight.detach().flatten(1).double()
    components: Tensor = torch.linalg.svd(filters - filters.mean(dim=0), full_matrices=False).Vh[:n]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    signed: Tensor = components * largest.sign()
    return signed.view(-1, *weight.shape[1:]).to(weight.dtype)


def _is_fused_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "num_heads", None), int)


def _map(module: Any, tokens: Tensor) -> Tensor:
    batch, length, _ = tokens.shape
    q, k, _ = module.qkv(tokens).view(batch, length, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (getattr(module, name, nn.Identity())(part) for name, part in (("q_norm", q), ("k_norm", k)))
    weights: Tensor = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return weights


def _returned_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    message = (
        f"model must be a VisionTransformer, have fused qkv layers, or return attentions; {type(model).__name__} does "
        "not (a Hugging Face model does with attn_implementation='eager')"
    )
    try:
        output = model(images, output_attentions=True)
    except TypeError as error:
        raise ValueError(message) from error
    attentions = getattr(output, "attentions", None)
    if not attentions or any(attention is None for attention in attentions):
        raise ValueError(message)
    return list(attentions)


def _prefix(maps: Sequence[Tensor], grid: Grid) -> int:
    if not len(maps):
        raise ValueError("maps must hold at least one block's attention, got none")
    prefix = maps[0].shape[-1] - math.prod(grid)
    if prefix < 0:
        raise ValueError(f"grid {grid} must have at most the maps' {maps[0].shape[-1]} tokens")
    return prefix
