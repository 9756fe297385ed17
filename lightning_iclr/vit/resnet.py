"""The ResNet stem of the hybrids (section 3.1, "Hybrid Architecture"), with GroupNorm and standardised weights.

It is the ResNet of Big Transfer (Kolesnikov et al. 2020) without the pre-activation; convolutions and the max pool
pad as TensorFlow's "SAME" does. Shapes: B images, C channels, (H, W) pixels. Parameters carry timm's names.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_iclr.transformer import init_lecun_

_GROUPS = 32  # of every GroupNorm, flax's default
_EXPANSION = 4  # a bottleneck's output over its middle width


class StdConv2d(nn.Conv2d):
    """Convolve with kernels standardised to mean 0 and variance 1 (Qiao et al. 2019), without a bias.

    Each output channel's kernel has its mean subtracted and is divided by its population standard deviation + 1e-5.
    The output has ceil(H / stride) rows; where an odd number of rows has to be padded, the last one is at the bottom.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Step between outputs.

    Examples:
        >>> import torch
        >>> StdConv2d(3, 8, kernel_size=7, stride=2)(torch.zeros(1, 3, 32, 33)).shape
        torch.Size([1, 8, 16, 17])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)

    def reset_parameters(self) -> None:
        """Draw the kernel from flax's default, a truncated normal of variance 1 / fan-in."""
        init_lecun_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        images = _pad_same(images, self.kernel_size[0], self.stride[0])
        return F.conv2d(images, (self.weight - mean) / (std + 1e-5), stride=self.stride)


class Bottleneck(nn.Module):
    """Add a 1x1, 3x3, 1x1 convolution branch to its input (He et al. 2016); the stride is on the 3x3.

    The last norm's scale starts at 0, so the block starts as its shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the 3x3 convolution; the output has four times as many.
        stride: Step of the 3x3 convolution and of the projected shortcut.

    Raises:
        ValueError: ``channels`` is not a multiple of 32, the groups of a norm.

    Examples:
        >>> import torch
        >>> Bottleneck(64, channels=32, stride=2)(torch.zeros(1, 64, 9, 8)).shape
        torch.Size([1, 128, 5, 4])
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = _EXPANSION * channels
        self.conv1 = StdConv2d(in_channels, channels, kernel_size=1)
        self.norm1 = _norm(channels)
        self.conv2 = StdConv2d(channels, channels, kernel_size=3, stride=stride)
        self.norm2 = _norm(channels)
        self.conv3 = StdConv2d(channels, out_channels, kernel_size=1)
        self.norm3 = _norm(out_channels)
        nn.init.zeros_(self.norm3.weight)
        self.downsample: Downsample | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = Downsample(in_channels, out_channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 4 channels, ceil(H / stride), ceil(W / stride))."""
        shortcut = images if self.downsample is None else self.downsample(images)
        branch = F.relu(self.norm1(self.conv1(images)))
        branch = F.relu(self.norm2(self.conv2(branch)))
        return F.relu(shortcut + self.norm3(self.conv3(branch)))


class Downsample(nn.Module):
    """Project a shortcut to the branch's size by a strided 1x1 convolution and a norm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Step between outputs.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = StdConv2d(in_channels, out_channels, kernel_size=1, stride=stride)
        self.norm = _norm(out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        projected: Tensor = self.norm(self.conv(images))
        return projected


class Root(nn.Module):
    """Reduce an image four times: 7x7 convolution of stride 2, GroupNorm, ReLU, 3x3 max pool of stride 2.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = StdConv2d(in_channels, out_channels, kernel_size=7, stride=2)
        self.norm = _norm(out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / 4, W / 4), rounded up twice."""
        features = F.relu(self.norm(self.conv(images)))
        # Padding with zeros is padding with minus infinity here: the ReLU left nothing below zero.
        return F.max_pool2d(_pad_same(features, kernel=3, stride=2), kernel_size=3, stride=2)


class Stage(nn.Module):
    """Chain bottlenecks of one width; the first may reduce the image.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the 3x3 convolutions; the output has four times as many.
        depth: Bottlenecks.
        stride: Stride of the first bottleneck.
    """

    def __init__(self, in_channels: int, channels: int, depth: int, stride: int) -> None:
        super().__init__()
        first = Bottleneck(in_channels, channels, stride)
        self.blocks = nn.Sequential(first, *(Bottleneck(_EXPANSION * channels, channels) for _ in range(depth - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 4 channels, ceil(H / stride), ceil(W / stride))."""
        features: Tensor = self.blocks(images)
        return features


class HybridStem(nn.Module):
    """Turn an image into the feature map whose cells are a hybrid's patches (section 3.1; models R50+B/16 and so on).

    A root of stride 4 and then stages of bottlenecks; every stage after the first halves the map. The paper's R50+B/16
    has stages (3, 4, 9) and patches of one cell, R50+L/32 (3, 4, 6, 3), R26+S/32 and R26+B/32 (2, 2, 2, 2). R+Ti/16
    has no stage and patches of 8x8 cells, which makes them 32 pixels wide, whatever its name says.

    Args:
        layers: Bottlenecks of each stage; empty for the root alone.
        width: Channels of the root and of the first stage's 3x3 convolutions; they double with each stage.
        in_channels: Channels of the image.

    Raises:
        ValueError: A stage without bottlenecks, ``width`` that is no multiple of 32 (the groups of a norm), or no
            channels.

    Examples:
        >>> import torch
        >>> stem = HybridStem(layers=(1, 1, 1), width=32)
        >>> stem.stride, stem.out_channels, stem(torch.zeros(1, 3, 32, 64)).shape
        (16, 512, torch.Size([1, 512, 2, 4]))
    """

    def __init__(self, layers: Sequence[int] = (3, 4, 9), width: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        if any(depth < 1 for depth in layers):
            raise ValueError(f"layers must hold at least 1 bottleneck a stage, got {tuple(layers)}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if width < 1 or width % _GROUPS:
            raise ValueError(f"width must be a positive multiple of {_GROUPS}, the groups of a norm, got {width}")
        self.layers, self.in_channels = tuple(layers), in_channels
        self.stem = Root(in_channels, width)
        self.stages = nn.ModuleList()
        self.out_channels, self.stride = width, 4
        for i, depth in enumerate(layers):
            channels, stride = width * 2**i, 1 if i == 0 else 2
            self.stages.append(Stage(self.out_channels, channels, depth, stride))
            self.out_channels, self.stride = _EXPANSION * channels, self.stride * stride

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, out_channels, H / stride, W / stride)."""
        features: Tensor = self.stem(images)
        for stage in self.stages:
            features = stage(features)
        return features


def _norm(channels: int) -> nn.GroupNorm:
    if channels % _GROUPS:
        raise ValueError(f"channels must be a multiple of {_GROUPS}, the groups of a norm, got {channels}")
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


def _pad_same(images: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad with zeros so that a window fits ceil(size / stride) times, the smaller half on top and on the left."""
    height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in images.shape[-2:])
    if not height and not width:
        return images
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))
