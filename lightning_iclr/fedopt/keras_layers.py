"""Layers that start and pad as Keras's do, for the networks of the paper, whose code is TensorFlow's."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TRUNCATED_STD = 0.87962566103423978  # deviation of a unit normal cut at +-2


class KerasLSTM(nn.LSTM):
    """An LSTM with Keras's one bias a gate and Keras's initial weights; torch's gates have Keras's order."""

    def __init__(self, input_dim: int, hidden_dim: int, kernel: Literal["he_normal", "glorot_uniform"]) -> None:
        super().__init__(input_dim, hidden_dim, batch_first=True)
        # What nn.LSTM calls wants a second bias. Setting the attribute tells it of the new tensor.
        delattr(self, "bias_hh_l0")
        self.register_buffer("bias_hh_l0", None, persistent=False)
        self.bias_hh_l0 = torch.zeros(4 * hidden_dim)
        if kernel == "he_normal":
            he_normal(self.get_parameter("weight_ih_l0"))
        else:
            nn.init.xavier_uniform_(self.get_parameter("weight_ih_l0"))
        nn.init.orthogonal_(self.get_parameter("weight_hh_l0"))
        with torch.no_grad():
            gates = self.get_parameter("bias_ih_l0").zero_().view(4, hidden_dim)
            gates[1] = 1.0  # input, forget, cell, output


def conv2d(in_channels: int, channels: int, kernel_size: int = 1, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """Return a convolution without bias whose kernel starts He-normal."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding, bias=False)
    he_normal(conv.weight)
    return conv


def group_norm(channels: int, num_groups: int) -> nn.GroupNorm:
    """Return a GroupNorm with the epsilon of Keras's norms."""
    return nn.GroupNorm(num_groups, channels, eps=1e-3)


def embedding(vocabulary_size: int, embedding_dim: int) -> nn.Embedding:
    """Return an embedding that starts uniform within 0.05."""
    table = nn.Embedding(vocabulary_size, embedding_dim)
    nn.init.uniform_(table.weight, -0.05, 0.05)
    return table


def he_normal(weight: Tensor) -> None:
    """Draw from Keras's ``he_normal``: a normal cut at two deviations, then of variance 2 / fan-in."""
    std = (2.0 / weight[0].numel()) ** 0.5 / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def glorot_uniform(net: nn.Module) -> None:
    """Draw all dense and convolutional weights from Keras's default, and set their biases to 0."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def pad_same(images: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Pad (B, C, H, W) with zeros to ceil(H / stride) windows; the odd row and column go to the bottom and right."""
    pads: list[int] = []
    for size in reversed(images.shape[-2:]):
        missing = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(images, pads)
