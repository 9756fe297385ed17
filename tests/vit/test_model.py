import math

import pytest
import torch
from torch import nn

from lightning_iclr.vit import HybridStem, VisionTransformer, sincos2d

TINY = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}


def randomised(**arguments):
    net = VisionTransformer(**{**TINY, **arguments}).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize(
    ("variant", "overrides", "count"),
    [
        ("Ti/16", {}, 5_717_416),
        ("S/16", {}, 22_050_664),
        ("S/32", {}, 22_878_952),
        ("B/8", {}, 86_576_872),
        ("B/16", {}, 86_567_656),
        ("B/32", {}, 88_224_232),
        ("L/16", {}, 304_326_632),
        ("L/32", {}, 306_535_400),
        ("H/14", {}, 632_045_800),
        ("B/16", {"image_size": 384}, 86_859_496),
        ("B/16", {"num_classes": 21_843, "representation_size": 768}, 103_186_515),
    ],
)
def test_variants_have_the_published_parameter_counts(variant, overrides, count):
    with torch.device("meta"):
        net = VisionTransformer.from_variant(variant, **overrides)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize(("variant", "grid"), [("R50+B/16", 14), ("R50+L/32", 7), ("R26+S/32", 7), ("R+Ti/16", 7)])
def test_hybrids_see_the_grid_of_their_name(variant, grid):
    with torch.device("meta"):
        net = VisionTransformer.from_variant(variant)
        tokens = net.embed(torch.zeros(1, 3, 224, 224))
    assert tokens.shape == (1, grid * grid, net.dim)
    assert net.grid == (grid, grid)


def test_an_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown variant 'G/14'; expected one of Ti/PATCH.*R50\+L/32"):
        VisionTransformer.from_variant("G/14")


def layer_norm(x, norm):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-6).sqrt() * norm.weight + norm.bias


def attend(q, k, v, heads):
    outs = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        outs.append(torch.softmax(q_h @ k_h.transpose(-1, -2) / math.sqrt(q_h.shape[-1]), -1) @ v_h)
    return torch.cat(outs, -1)


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(x, layer):
    return gelu_tanh(x @ layer.fc1.weight.T + layer.fc1.bias) @ layer.fc2.weight.T + layer.fc2.bias


def by_hand(net, image):
    """Equations 1 to 4 for one image, patch by patch."""
    (ph, pw), (gh, gw) = net.patch_size, net.grid
    kernel, bias = net.patch_embed.proj.weight, net.patch_embed.proj.bias
    rows = []
    for i in range(gh):
        for j in range(gw):
            patch = image[:, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw]
            rows.append((kernel * patch).sum((1, 2, 3)) + bias)
    x = torch.stack(rows)
    if net.pool == "token":
        x = torch.cat([net.cls_token[0], x])
    x = x + net.pos_embed[0]
    for block in net.blocks:
        y = layer_norm(x, block.norm1)
        q, k, v = (
            y @ w.T + b for w, b in zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        )
        x = x + attend(q, k, v, net.num_heads) @ block.attn.proj.weight.T + block.attn.proj.bias
        x = x + mlp(layer_norm(x, block.norm2), block.mlp)
    x = layer_norm(x, net.norm)
    if net.pool == "token":
        y = x[0]
    elif net.pool == "mean":
        y = sum(x) / len(x)
    else:
        pool = net.attn_pool
        q = pool.latent[0] @ pool.q.weight.T + pool.q.bias
        k, v = (x @ w.T + b for w, b in zip(pool.kv.weight.chunk(2), pool.kv.bias.chunk(2), strict=True))
        y = attend(q, k, v, net.num_heads) @ pool.proj.weight.T + pool.proj.bias
        y = (y + mlp(layer_norm(y, pool.norm), pool.mlp))[0]
    if net.pre_logits is not None:
        y = torch.tanh(net.pre_logits.weight @ y + net.pre_logits.bias)
    return net.head.weight @ y + net.head.bias


@pytest.mark.parametrize("pool", ["token", "mean", "map"])
@pytest.mark.parametrize("representation_size", [None, 10])
def test_logits_equal_the_equations_written_out(pool, representation_size):
    net = randomised(pool=pool, representation_size=representation_size, image_size=(8, 12), patch_size=(2, 4))
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    expected = torch.stack([by_hand(net, image) for image in images])
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-10)


def test_first_logits_are_the_heads_bias_and_the_loss_is_ln_k():
    net = VisionTransformer(**TINY, head_bias=-6.9)
    logits = net(torch.randn(4, 3, 8, 8))
    torch.testing.assert_close(logits, torch.full((4, 3), -6.9))
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    assert loss.item() == pytest.approx(math.log(3), abs=1e-6)


def assert_uniform(weight, bound):
    # A uniform variable of variance s^2 has fourth moment 9/5 s^4: the sample variance deviates by s^2 sqrt(.8/n).
    variance = bound**2 / 3
    assert abs(weight.var().item() - variance) < 4 * variance * math.sqrt(0.8 / weight.numel())
    assert weight.abs().max().item() <= bound


def assert_truncated_normal(weight, variance):
    # Cut at two deviations, a normal's kurtosis is 2.37, so the sample variance deviates by s^2 sqrt(1.37/n)
    assert abs(weight.var().item() - variance) < 4 * variance * math.sqrt(1.37 / weight.numel())
    assert weight.abs().max().item() <= 2 * math.sqrt(variance) / 0.8796


def test_initial_weights_have_the_official_variances():
    net = VisionTransformer(image_size=32, patch_size=8, num_classes=2, dim=256, depth=1, num_heads=4)
    block = net.blocks[0]
    square = math.sqrt(6 / (2 * 256))  # Xavier's bound
    for weight in (*block.attn.qkv.weight.chunk(3), block.attn.proj.weight):
        assert_uniform(weight, square)
    assert_truncated_normal(net.patch_embed.proj.weight, 1 / (3 * 8 * 8))
    for layer in (block.mlp.fc1, block.mlp.fc2):
        assert_uniform(layer.weight, math.sqrt(6 / (256 + 1024)))
        assert 0 < layer.bias.std().item() < 2e-6
    for layer in (block.attn.qkv, block.attn.proj, net.patch_embed.proj):
        assert not layer.bias.any()
    positions = net.pos_embed
    assert abs(positions.std().item() - 0.02) < 4 * 0.02 / math.sqrt(2 * positions.numel())
    assert not net.cls_token.any()
    assert not net.head.weight.any()


def test_attention_pooling_and_the_hidden_layer_start_as_the_official_ones():
    net = VisionTransformer(**{**TINY, "dim": 256}, pool="map", representation_size=128)
    pool = net.attn_pool
    assert_uniform(pool.latent, math.sqrt(6 / (1 + 256)))
    for weight in (pool.q.weight, *pool.kv.weight.chunk(2), pool.proj.weight):
        assert_uniform(weight, math.sqrt(6 / (2 * 256)))
    for layer in (pool.mlp.fc1, pool.mlp.fc2):
        assert_uniform(layer.weight, math.sqrt(6 / (256 + 24)))
    assert_truncated_normal(net.pre_logits.weight, 1 / 256)
    for layer in (pool.q, pool.kv, pool.proj, net.pre_logits):
        assert not layer.bias.any()


def test_the_class_token_has_no_fixed_position():
    net = VisionTransformer(**TINY, pool="token", position="sincos2d")
    assert not net.pos_embed[0, 0].any()
    assert torch.equal(net.pos_embed[0, 1:], sincos2d(16, (2, 2)))


def test_without_positions_the_mean_does_not_see_the_order_of_patches():
    order = torch.randperm(4)
    tokens = torch.randn(2, 4, 16, dtype=torch.float64)
    plain, placed = randomised(pool="mean", position="none"), randomised(pool="mean", position="learned")
    torch.testing.assert_close(plain.encode(tokens[:, order]).mean(1), plain.encode(tokens).mean(1), rtol=0, atol=1e-12)
    assert not torch.allclose(placed.encode(tokens[:, order]).mean(1), placed.encode(tokens).mean(1), atol=1e-3)


class Softmax(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.scale = (dim // num_heads) ** -0.5

    def forward(self, q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * self.scale, dim=-1) @ v


def test_a_hand_written_softmax_plugs_in_and_equals_the_built_in_one():
    ours = randomised()
    theirs = VisionTransformer(**TINY, attention=Softmax).double()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-12)


def test_checkpointed_blocks_give_the_same_values_and_gradients():
    plain = randomised()
    recomputed = VisionTransformer(**TINY, checkpoint_blocks=True).double()
    recomputed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for net, runs in ((plain, 1), (recomputed, 2)):
        calls = []
        for block in net.blocks:
            block.register_forward_pre_hook(lambda block, inputs, calls=calls: calls.append(block))
        net.train()(images).square().sum().backward()
        assert len(calls) == runs * net.depth
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-12, msg=name)


def test_bfloat16_stays_within_two_percent_of_float32():
    net = randomised().float()
    images = torch.randn(4, 3, 8, 8)
    exact = net(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = net(images).float()
    assert (rough - exact).abs().max() < 2e-2 * exact.abs().max()


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("position", ["learned", "sincos2d"])
def test_dynamic_size_accepts_other_rectangles(pool, position):
    net = randomised(pool=pool, position=position, dynamic_size=True)
    assert net(torch.randn(1, 3, 12, 20, dtype=torch.float64)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"patch_size \(4, 4\) must divide the images' size, got \(12, 21\)"):
        net(torch.zeros(1, 3, 12, 21, dtype=torch.float64))


def test_fixed_positions_at_another_size_are_those_of_a_network_built_for_it():
    small = randomised(position="sincos2d", dynamic_size=True)
    large = VisionTransformer(**{**TINY, "image_size": (12, 20)}, position="sincos2d").double()
    large.load_state_dict({k: v for k, v in small.state_dict().items() if k != "pos_embed"}, strict=False)
    images = torch.randn(1, 3, 12, 20, dtype=torch.float64)
    torch.testing.assert_close(small(images), large(images), rtol=0, atol=1e-12)


def test_dropout_sits_after_positions_and_in_every_block(monkeypatch):
    inputs = []
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, *_: (inputs.append((x, p)), x)[1])
    net, images = VisionTransformer(**TINY, dropout=0.1).train(), torch.randn(2, 3, 8, 8)
    net(images)
    assert [p for _, p in inputs] == [0.1] * (1 + 3 * net.depth)
    tokens = torch.cat([net.cls_token.expand(2, -1, -1), net.embed(images)], dim=1)
    torch.testing.assert_close(inputs[0][0], tokens + net.pos_embed)


def test_stochastic_depth_grows_linearly_with_depth():
    net = VisionTransformer(**{**TINY, "depth": 5}, drop_path=0.2)
    rates = [block.drop_path.probability for block in net.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 3}, r"patch_size must divide image_size, got \(3, 3\) and \(8, 8\)"),
        ({"image_size": 0}, "image_size must be one or two numbers of at least 1, got 0"),
        ({"num_heads": 5}, "num_heads must divide dim, got num_heads 5 and dim 16"),
        ({"dim": 18, "position": "sincos2d"}, "dim"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"pool": "max"}, "pool must be one of 'token', 'mean', 'map', got 'max'"),
        ({"position": "rotary"}, "position must be one of 'learned', 'sincos2d', 'none', got 'rotary'"),
        ({"position_mode": "nearest"}, "mode must be one of"),
        ({"drop_path": 1.5}, r"drop_path must be in \[0, 1\), got 1.5"),
        (
            {"image_size": 32, "patch_size": 16, "in_channels": 1, "stem": HybridStem((), width=32)},
            "the stem's 3, got 1",
        ),
        ({"num_classes": -1}, r"num_classes must be 0 \(no head\) or more, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**TINY, **arguments})


def test_wrong_images_are_refused_with_what_was_expected():
    net = VisionTransformer(**TINY)
    with pytest.raises(ValueError, match=r"images must have 3 channels, got shape \(1, 1, 8, 8\)"):
        net(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"images must be \(8, 8\) pixels .* got \(8, 12\).*dynamic_size=True"):
        net(torch.zeros(1, 3, 8, 12))
