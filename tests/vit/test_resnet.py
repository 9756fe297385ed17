import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_iclr.vit import VisionTransformer
from lightning_iclr.vit.resnet import Bottleneck, HybridStem, Root, StdConv2d


def same_windows(images, kernel, stride, fill):
    """Every window of TensorFlow's SAME padding, by loops: (B, C, rows, columns, kernel, kernel)."""
    batch, channels, height, width = images.shape
    rows, columns = -(-height // stride), -(-width // stride)
    top = max((rows - 1) * stride + kernel - height, 0) // 2
    left = max((columns - 1) * stride + kernel - width, 0) // 2
    windows = images.new_full((batch, channels, rows, columns, kernel, kernel), fill)
    for i in range(rows):
        for j in range(columns):
            for a in range(kernel):
                for b in range(kernel):
                    y, x = i * stride - top + a, j * stride - left + b
                    if 0 <= y < height and 0 <= x < width:
                        windows[:, :, i, j, a, b] = images[:, :, y, x]
    return windows


@pytest.mark.parametrize(("kernel", "stride", "size"), [(7, 2, (8, 9)), (3, 2, (6, 7)), (3, 1, (5, 4)), (1, 2, (5, 6))])
def test_convolutions_standardise_their_kernels_and_pad_as_tensorflow_does(kernel, stride, size):
    conv = StdConv2d(2, 3, kernel, stride).double()
    images = torch.randn(2, 2, *size, dtype=torch.float64)
    weight = conv.weight.detach().clone()
    for out in range(3):
        weight[out] = (weight[out] - weight[out].mean()) / (weight[out].std(correction=0) + 1e-5)
    expected = torch.einsum("bcijxy,ocxy->boij", same_windows(images, kernel, stride, 0.0), weight)
    torch.testing.assert_close(conv(images), expected, rtol=0, atol=1e-10)


def test_the_root_pools_the_largest_of_each_window_padded_at_the_bottom_and_right():
    root = Root(3, 32).double()
    images = torch.randn(1, 3, 24, 20, dtype=torch.float64)
    features = F.relu(root.norm(root.conv(images)))
    expected = same_windows(features, 3, 2, float("-inf")).amax(dim=(-2, -1))
    torch.testing.assert_close(root(images), expected, rtol=0, atol=0)


def test_norms_have_32_groups_of_the_official_epsilon():
    norms = [m for m in HybridStem((1, 1)).modules() if isinstance(m, nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-6)}


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bottleneck_starts_as_its_shortcut(stride):
    block = Bottleneck(128, channels=32, stride=stride)
    images = torch.randn(2, 128, 6, 6)
    shortcut = images if block.downsample is None else block.downsample(images)
    torch.testing.assert_close(block(images), F.relu(shortcut), rtol=0, atol=1e-6)
    assert (block.downsample is None) == (stride == 1)


@pytest.mark.parametrize(
    ("layers", "stride", "channels"), [((), 4, 64), ((3, 4, 9), 16, 1024), ((3, 4, 6, 3), 32, 2048), ((2, 2), 8, 512)]
)
def test_stems_have_the_stride_and_channels_of_their_stages(layers, stride, channels):
    with torch.device("meta"):
        stem = HybridStem(layers)
        features = stem(torch.zeros(1, 3, 64, 96))
    assert (stem.stride, stem.out_channels) == (stride, channels)
    assert features.shape == (1, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize(
    ("variant", "count"),
    [("R+Ti/16", 6_355_944), ("R26+S/32", 36_468_392), ("R50+B/16", 98_950_952), ("R50+L/32", 329_092_136)],
)
def test_hybrids_have_the_published_parameter_counts(variant, count):
    """At 384 pixels; timm's tables print 6.36, 36.47, 98.95 and 329.09 million."""
    with torch.device("meta"):
        net = VisionTransformer.from_variant(variant, image_size=384)
    assert sum(p.numel() for p in net.parameters()) == count


def test_every_bottleneck_of_a_new_stem_is_its_shortcut():
    stem = HybridStem((2, 2), width=32).double()
    images = torch.randn(1, 3, 32, 24, dtype=torch.float64)
    expected = stem.stem(images)
    for stage in stem.stages:  # only the first bottleneck of a stage changes shape, and so projects
        expected = F.relu(stage.blocks[0].downsample(expected))
    torch.testing.assert_close(stem(images), expected, rtol=0, atol=1e-12)


def test_a_hybrid_trains_from_end_to_end():
    net = VisionTransformer(
        image_size=32, dim=16, depth=1, num_heads=2, num_classes=2, stem=HybridStem((1, 1, 1), width=32)
    )
    nn.init.normal_(net.head.weight)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": (3, 0)}, r"layers must hold at least 1 bottleneck a stage, got \(3, 0\)"),
        ({"width": 40}, "width must be a positive multiple of 32.*got 40"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HybridStem(**arguments)


def test_a_patch_that_the_stem_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"patch_size must be a multiple of the stem's stride 4, got \(6, 6\)"):
        VisionTransformer(image_size=24, patch_size=6, dim=16, depth=1, num_heads=2, stem=HybridStem(()))
