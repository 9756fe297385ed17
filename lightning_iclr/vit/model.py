"""The Vision Transformer (Dosovitskiy et al., ICLR 2021, section 3.1) in plain torch.

Shapes: B images, C channels, N patches in a grid (h, w), T = N tokens or N + 1 with a class token, D width, K classes.
Parameters carry timm's names, so that most published checkpoints load as they are.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_iclr.transformer import MLP, Activation, Attention, EncoderBlock, init_lecun_, init_linear_, init_qkv_
from lightning_iclr.vit.positions import Grid, ResizeMode, check_mode, resize_position_embedding, sincos2d
from lightning_iclr.vit.resnet import HybridStem

Pool = Literal["token", "mean", "map"]
Position = Literal["learned", "sincos2d", "none"]

VARIANTS: dict[str, dict[str, int]] = {
    "Ti": {"dim": 192, "depth": 12, "mlp_dim": 768, "num_heads": 3},
    "S": {"dim": 384, "depth": 12, "mlp_dim": 1536, "num_heads": 6},
    "B": {"dim": 768, "depth": 12, "mlp_dim": 3072, "num_heads": 12},
    "L": {"dim": 1024, "depth": 24, "mlp_dim": 4096, "num_heads": 16},
    "H": {"dim": 1280, "depth": 32, "mlp_dim": 5120, "num_heads": 16},
}
HYBRIDS: dict[str, tuple[int, ...]] = {  # bottlenecks of the stem's stages
    "R+Ti/16": (),
    "R26+S/32": (2, 2, 2, 2),
    "R26+B/32": (2, 2, 2, 2),
    "R50+B/16": (3, 4, 9),
    "R50+L/32": (3, 4, 6, 3),
}


class PatchEmbed(nn.Module):
    """Cut an image, or the feature map of a stem, into patches and project each to a token (equation 1).

    Args:
        patch_size: Height and width of a patch, in pixels of the image.
        in_channels: Channels of the image.
        dim: Width D of a token.
        stem: Convolutional stem of a hybrid for ``in_channels``.

    Raises:
        ValueError: The stem takes other channels, or its stride does not divide ``patch_size``.

    Examples:
        >>> import torch
        >>> PatchEmbed(patch_size=(2, 4), in_channels=1, dim=32)(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 8, 32])
    """

    def __init__(self, patch_size: Grid, in_channels: int, dim: int, stem: HybridStem | None = None) -> None:
        super().__init__()
        kernel = patch_size
        if stem is not None:
            if stem.in_channels != in_channels:
                raise ValueError(f"in_channels must be the stem's {stem.in_channels}, got {in_channels}")
            if patch_size[0] % stem.stride or patch_size[1] % stem.stride:
                raise ValueError(f"patch_size must be a multiple of the stem's stride {stem.stride}, got {patch_size}")
            kernel = (patch_size[0] // stem.stride, patch_size[1] // stem.stride)
            in_channels = stem.out_channels
            self.backbone = stem
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=kernel, stride=kernel)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, N, D), row by row."""
        if hasattr(self, "backbone"):
            images = self.backbone(images)
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """Pool tokens by multi-head attention from one learned query, then an MLP (MAP; Zhai et al. 2022, section 3.1).

    Args:
        dim: Width D of a token.
        num_heads: Attention heads.
        mlp_dim: Hidden width of the MLP.
        activation: Non-linearity of the MLP.
        norm_eps: Epsilon of the LayerNorm.

    Examples:
        >>> import torch
        >>> AttentionPool(dim=8, num_heads=2, mlp_dim=16)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_dim: int, activation: Activation = "gelu", norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, mlp_dim, activation)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T, D) to one vector an image (B, D)."""
        batch, length, dim = tokens.shape
        q = self.q(self.latent.expand(batch, -1, -1)).view(batch, 1, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(tokens).view(batch, length, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        pooled = F.scaled_dot_product_attention(q, k, v)
        pooled = self.proj(pooled.transpose(1, 2).reshape(batch, dim))
        out: Tensor = pooled + self.mlp(self.norm(pooled))
        return out


class VisionTransformer(nn.Module):
    """Classify images with a transformer over patches (section 3.1, equations 1 to 4).

    With ``pool="mean"`` all tokens are averaged after the final LayerNorm and there is no class token, as in the
    official code. ``"map"`` pools by attention from a learned query. Weights are drawn as the official code draws
    them: the head is zero, so the first logits are ``head_bias``.

    Args:
        image_size: Height and width of the images, in pixels; one number for squares.
        patch_size: Height and width of a patch, in pixels; one number for squares.
        in_channels: Channels C of the images.
        num_classes: Classes K; 0 leaves the head out and returns what it would see.
        dim: Width D of a token.
        depth: Encoder blocks.
        num_heads: Attention heads; must divide ``dim``.
        mlp_dim: Hidden width of the MLPs; ``None`` for 4 D.
        pool: What the head sees: the class token, the mean of all tokens, or attention pooling.
        position: Learned embeddings, fixed two-dimensional sines and cosines, or none.
        representation_size: Width of the hidden tanh layer that pre-training puts before the head; ``None`` for none.
        activation: ``gelu_tanh`` as the official code computes it, or ``gelu`` (erf) as timm and Hugging Face do.
        dropout: Dropout after adding positions, after attention and twice in each MLP.
        drop_path: Stochastic depth of the last block; earlier blocks have linearly less.
        dynamic_size: Accept images of any size that the patches divide, resizing positions at run time.
        position_mode: How learned positions are resized to another grid; see `resize_position_embedding`.
        attention: Builds each block's attention from (width, heads) in place of softmax; see `transformer.Attention`.
        checkpoint_blocks: Recompute each block in the backward pass instead of keeping its activations.
        stem: ResNet stem of a hybrid (section 3.1, "Hybrid Architecture") for ``in_channels``; its stride divides
            ``patch_size``.
        norm_eps: Epsilon of every LayerNorm.
        head_bias: Initial bias of the head; the official code takes -10 before sigmoid pre-training on ImageNet-21k.

    Raises:
        ValueError: Sizes that do not fit each other, an unknown choice, or a probability outside [0, 1).

    Examples:
        >>> import torch
        >>> net = VisionTransformer(image_size=(8, 16), patch_size=4, num_classes=10, dim=32, depth=2, num_heads=4)
        >>> net(torch.zeros(2, 3, 8, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_dim: int | None = None,
        pool: Pool = "token",
        position: Position = "learned",
        representation_size: int | None = None,
        activation: Activation = "gelu_tanh",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dynamic_size: bool = False,
        position_mode: ResizeMode = "bilinear_corners",
        attention: Callable[[int, int], nn.Module] | None = None,
        checkpoint_blocks: bool = False,
        stem: HybridStem | None = None,
        norm_eps: float = 1e-6,
        head_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = _pair("image_size", image_size)
        self.patch_size = _pair("patch_size", patch_size)
        _check_choice("pool", pool, ("token", "mean", "map"))
        _check_choice("position", position, ("learned", "sincos2d", "none"))
        check_mode(position_mode)
        if not dynamic_size and any(i % p for i, p in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"patch_size must divide image_size, got {self.patch_size} and {self.image_size}")
        for name, value in (("depth", depth), ("dim", dim), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no head) or more, got {num_classes}")
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        self.grid: Grid = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.in_channels, self.num_classes = in_channels, num_classes
        self.dim, self.depth, self.num_heads = dim, depth, num_heads
        self.pool, self.position, self.position_mode = pool, position, position_mode
        self.dynamic_size, self.checkpoint_blocks = dynamic_size, checkpoint_blocks
        self.head_bias = head_bias
        self.num_prefix_tokens = int(pool == "token")
        mlp_dim = mlp_dim or 4 * dim

        self.patch_embed = PatchEmbed(self.patch_size, in_channels, dim, stem)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if pool == "token" else None
        self.pos_embed: Tensor | None
        if position == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, self.num_prefix_tokens + math.prod(self.grid), dim))
        else:
            self.register_buffer("pos_embed", self._fixed_positions(self.grid) if position == "sincos2d" else None)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                dim,
                num_heads,
                mlp_dim,
                activation=activation,
                dropout=dropout,
                drop_path=drop_path * i / max(depth - 1, 1),
                attention=None if attention is None else attention(dim, num_heads),
                norm_eps=norm_eps,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attn_pool = AttentionPool(dim, num_heads, mlp_dim, activation, norm_eps) if pool == "map" else None
        self.pre_logits = nn.Linear(dim, representation_size) if representation_size else None
        self.head = nn.Linear(representation_size or dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> Self:
        """Build a variant by its name in the paper or the official code: ``B/16``, ``H/14``, ``R50+L/32``, ...

        Args:
            name: Size (Ti, S, B, L, H), a slash and the patch size; or one of the hybrids.
            overrides: Arguments of the constructor.

        Raises:
            ValueError: An unknown name; the message lists the known ones.
        """
        match = re.fullmatch(r"(?:R\d*\+)?(Ti|S|B|L|H)/([1-9]\d*)", name)
        if match is None or ("+" in name and name not in HYBRIDS):
            known = ", ".join([*(f"{size}/PATCH" for size in VARIANTS), *HYBRIDS])
            raise ValueError(f"unknown variant {name!r}; expected one of {known}")
        # The official R+Ti/16 has patches of 8 cells of its stem, which is 32 pixels.
        patch_size = 32 if name == "R+Ti/16" else int(match[2])
        arguments: dict[str, Any] = {**VARIANTS[match[1]], "patch_size": patch_size, **overrides}
        if name in HYBRIDS and "stem" not in arguments:
            arguments["stem"] = HybridStem(HYBRIDS[name], in_channels=arguments.get("in_channels", 3))
        return cls(**arguments)

    def embed(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to patch embeddings (B, N, D), before positions.

        Raises:
            ValueError: Another number of channels, or a size that the network was not built for.
        """
        self._grid_of(images)
        tokens: Tensor = self.patch_embed(images)
        return tokens

    def encode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map patch embeddings (B, N, D) of a grid (h, w) to the encoder's output (B, T, D), after the final norm."""
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        positions = self._positions(grid or self.grid)
        if positions is not None:
            tokens = tokens + positions
        tokens = self.dropout(tokens)
        recompute = self.checkpoint_blocks and torch.is_grad_enabled()
        for block in self.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
        encoded: Tensor = self.norm(tokens)
        return encoded

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the encoder's output (B, T, D), after the final norm."""
        return self.encode(self.embed(images), self._grid_of(images))

    def represent(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to what the head sees: (B, D), or (B, representation_size)."""
        tokens = self.forward_features(images)
        if self.attn_pool is not None:
            pooled = self.attn_pool(tokens)
        else:
            pooled = tokens[:, 0] if self.pool == "token" else tokens.mean(dim=1)
        return pooled if self.pre_logits is None else torch.tanh(self.pre_logits(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.head(self.represent(images))
        return logits

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights as the official code does; a hybrid's stem draws its own."""
        for module in self.modules():
            if isinstance(module, Attention):
                init_qkv_(module.qkv)
                init_linear_(module.proj)
            elif isinstance(module, MLP):
                for layer in (module.fc1, module.fc2):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.normal_(layer.bias, std=1e-6)
        init_lecun_(self.patch_embed.proj)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.pos_embed, std=0.02)
        if self.attn_pool is not None:
            nn.init.xavier_uniform_(self.attn_pool.latent[0])
            for layer in (self.attn_pool.q, self.attn_pool.proj):
                init_linear_(layer)
            for half in self.attn_pool.kv.weight.chunk(2):
                nn.init.xavier_uniform_(half)
            nn.init.zeros_(self.attn_pool.kv.bias)
        if self.pre_logits is not None:
            init_lecun_(self.pre_logits)
        self.reset_head()

    @torch.no_grad()
    def reset_head(self) -> None:
        """Set the head to zero weights and ``head_bias``, as before training or fine-tuning."""
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, self.head_bias)

    def _grid_of(self, images: Tensor) -> Grid:
        channels, height, width = images.shape[-3:]
        if channels != self.in_channels:
            raise ValueError(f"images must have {self.in_channels} channels, got shape {tuple(images.shape)}")
        if (height, width) != self.image_size:
            if not self.dynamic_size:
                raise ValueError(
                    f"images must be {self.image_size} pixels (height, width), got {(height, width)}; "
                    "other sizes need dynamic_size=True"
                )
            if height % self.patch_size[0] or width % self.patch_size[1]:
                raise ValueError(f"patch_size {self.patch_size} must divide the images' size, got {(height, width)}")
        return height // self.patch_size[0], width // self.patch_size[1]

    def _positions(self, grid: Grid) -> Tensor | None:
        if self.pos_embed is None or grid == self.grid:
            return self.pos_embed
        if self.position == "sincos2d":
            return self._fixed_positions(grid).to(self.pos_embed)
        return resize_position_embedding(
            self.pos_embed, self.grid, grid, num_prefix_tokens=self.num_prefix_tokens, mode=self.position_mode
        )

    def _fixed_positions(self, grid: Grid) -> Tensor:
        patches = sincos2d(self.dim, grid).view(1, -1, self.dim)
        return torch.cat([patches.new_zeros(1, self.num_prefix_tokens, self.dim), patches], dim=1)


def _pair(name: str, size: int | tuple[int, int]) -> Grid:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be one or two numbers of at least 1, got {size}")
    return height, width


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
