"""The transformer encoder block that several methods share, with a pluggable attention.

Shapes: B images or sequences, T tokens, D width, H heads, Dh = D / H width of a head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "relu"]


class Attention(nn.Module):
    """Attend over all tokens with several heads (Vaswani et al. 2017, section 3.2.2).

    Args:
        dim: Width D of a token; a multiple of ``num_heads``.
        num_heads: Heads H.
        dropout: Probability of zeroing an element of the output.
        attention: Maps queries, keys and values, each (B, H, T, Dh), to (B, H, T, Dh), in place of softmax attention.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``dropout`` is outside [0, 1).

    Examples:
        >>> import torch
        >>> Attention(dim=8, num_heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0, attention: nn.Module | None = None) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads {num_heads} and dim {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention = attention
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(_probability("dropout", dropout))

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map tokens (B, T, D) to queries, keys and values, each a view (B, H, T, Dh) of one projection."""
        # Three chunks rather than one permuted five-dimensional view: the backward pass then copies once, not twice.
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        return q, k, v

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        q, k, v = self.heads(tokens)
        mixed = F.scaled_dot_product_attention(q, k, v) if self.attention is None else self.attention(q, k, v)
        out: Tensor = self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))
        return out


class MLP(nn.Module):
    """Apply two linear layers with a GELU between to each token on its own.

    Args:
        dim: Width D of a token.
        hidden_dim: Width between the two layers.
        activation: ``gelu`` (by erf), ``gelu_tanh`` (its tanh approximation, JAX's default) or ``relu``.
        dropout: Probability of zeroing a hidden unit, and an element of the output.

    Raises:
        ValueError: ``activation`` is unknown, or ``dropout`` is outside [0, 1).

    Examples:
        >>> import torch
        >>> MLP(dim=8, hidden_dim=16)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = _activation(activation)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(_probability("dropout", dropout))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (..., D) to (..., D)."""
        out: Tensor = self.dropout(self.fc2(self.dropout(self.act(self.fc1(tokens)))))
        return out


class DropPath(nn.Module):
    """Drop a residual branch for whole samples while training (Huang et al. 2016, stochastic depth).

    What is kept is divided by the probability of keeping it, so evaluation needs no rescaling.

    Args:
        probability: Chance that a sample loses the branch, in [0, 1).

    Raises:
        ValueError: ``probability`` is outside [0, 1).

    Examples:
        >>> import torch
        >>> DropPath(0.5).eval()(torch.ones(2, 3)).sum()
        tensor(6.)
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = _probability("drop_path", probability)

    def forward(self, branch: Tensor) -> Tensor:
        """Map a branch (B, ...) to the same shape, some samples zeroed."""
        if not self.training or self.probability == 0.0:
            return branch
        keep = 1.0 - self.probability
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        kept: Tensor = branch * mask / keep
        return kept


class EncoderBlock(nn.Module):
    """One transformer encoder layer: attention, then an MLP, each with a residual connection and a LayerNorm.

    Args:
        dim: Width D of a token.
        num_heads: Attention heads.
        mlp_dim: Hidden width of the MLP; ``None`` for 4 D.
        norm_first: Normalise before each branch (pre-LN, ViT) or after each residual sum (post-LN, BERT).
        activation: Non-linearity of the MLP.
        dropout: Dropout after the attention and twice in the MLP; the attention weights are not dropped.
        drop_path: Probability of dropping each branch for a whole sample.
        attention: Replaces softmax attention; see `Attention`.
        norm_eps: Epsilon of the LayerNorms.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, an unknown activation, or a probability outside [0, 1).

    Examples:
        >>> import torch
        >>> EncoderBlock(dim=8, num_heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int | None = None,
        norm_first: bool = True,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        attention: nn.Module | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, dropout, attention)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, mlp_dim or 4 * dim, activation, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        if self.norm_first:
            tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
            out: Tensor = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
            return out
        tokens = self.norm1(tokens + self.drop_path(self.attn(tokens)))
        normed: Tensor = self.norm2(tokens + self.drop_path(self.mlp(tokens)))
        return normed


def init_linear_(layer: nn.Linear) -> None:
    """Draw a linear layer's kernel from Xavier's uniform distribution and zero its bias."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


def init_lecun_(layer: nn.Conv2d | nn.Linear) -> None:
    """Draw a kernel of variance 1 / fan-in, cut at two standard deviations as in flax, and zero the bias."""
    std = layer.weight[0].numel() ** -0.5 / 0.87962566103423978  # deviation of a unit normal cut at +-2
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def init_qkv_(layer: nn.Linear) -> None:
    """Draw the query, key and value thirds of a fused projection (3 D, D) each as a D x D Xavier kernel.

    Xavier on the fused matrix would see 3 D outputs and leave each third 0.71 times too small.
    """
    with torch.no_grad():
        for third in layer.weight.chunk(3):
            nn.init.xavier_uniform_(third)
    nn.init.zeros_(layer.bias)


def _activation(name: str) -> nn.Module:
    if name == "gelu":
        return nn.GELU()
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    if name == "relu":
        return nn.ReLU()
    raise ValueError(f"activation must be 'gelu', 'gelu_tanh' or 'relu', got {name!r}")


def _probability(name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value
