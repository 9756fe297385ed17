import math
import re
import warnings

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from lightning_iclr.vit import (
    HybridStem,
    MaskedPatchPretraining,
    VisionTransformer,
    ViTClassifier,
    convert_state_dict,
    load_official,
    load_pretrained,
    resize_position_embedding,
    to_hf,
    to_official,
    to_timm,
)

SIZES = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}


def network(**arguments):
    net = VisionTransformer(**{**SIZES, **arguments}).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def hugging_face(kind=ViTForImageClassification, image_size=(8, 8)):
    config = ViTConfig(
        image_size=image_size, patch_size=4, num_labels=3, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = kind(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


# Hugging Face


def test_logits_equal_hugging_face_s_with_its_weights():
    theirs, ours = hugging_face(), network()
    load_pretrained(ours, theirs.state_dict())
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=1e-10)


def test_logits_equal_hugging_face_s_with_our_weights():
    theirs, ours = hugging_face(), network(activation="gelu")
    theirs.load_state_dict(to_hf(ours.state_dict()))
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(theirs(images).logits, ours(images), rtol=0, atol=1e-10)


def test_the_pooler_is_the_hidden_tanh_layer():
    theirs = hugging_face(ViTModel)
    ours = network(num_classes=0, representation_size=16)
    load_pretrained(ours, theirs.state_dict())
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images).pooler_output, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.forward_features(images), theirs(images).last_hidden_state, rtol=0, atol=1e-10)


def test_another_size_equals_hugging_face_s_interpolation():
    theirs, ours = hugging_face(), network(dynamic_size=True, position_mode="bicubic")
    load_pretrained(ours, theirs.state_dict())
    images = torch.randn(2, 3, 56, 24, dtype=torch.float64)
    expected = theirs(images, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-10)


def test_names_of_transformers_4_load_too():
    state = network().state_dict()
    old = to_hf(state, version=4)
    assert {name for name in old if "layer.0." in name} == {
        f"vit.encoder.layer.0.{module}.{leaf}"
        for module in (
            "layernorm_before",
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
            "layernorm_after",
            "intermediate.dense",
            "output.dense",
        )
        for leaf in ("weight", "bias")
    }
    back = convert_state_dict(old)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert back.keys() == state.keys()


# The official files


def npz_key(block, leaf):
    return f"Transformer/encoderblock_{block}/{leaf}"


def official_arrays(patches=6, dim=16, heads=2, mlp=24, depth=2, hidden=12, classes=3):
    """Draw what ``vit_jax`` would save, by its own names and shapes."""
    width = dim // heads
    shapes = {
        "cls": (1, 1, dim),
        "embedding/kernel": (4, 4, 3, dim),
        "embedding/bias": (dim,),
        "Transformer/posembed_input/pos_embedding": (1, 1 + patches, dim),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
        "pre_logits/kernel": (dim, hidden),
        "pre_logits/bias": (hidden,),
        "head/kernel": (hidden, classes),
        "head/bias": (classes,),
    }
    for i in range(depth):
        for number in (0, 2):
            shapes |= {npz_key(i, f"LayerNorm_{number}/{leaf}"): (dim,) for leaf in ("scale", "bias")}
        for part in ("query", "key", "value"):
            shapes[npz_key(i, f"MultiHeadDotProductAttention_1/{part}/kernel")] = (dim, heads, width)
            shapes[npz_key(i, f"MultiHeadDotProductAttention_1/{part}/bias")] = (heads, width)
        shapes[npz_key(i, "MultiHeadDotProductAttention_1/out/kernel")] = (heads, width, dim)
        shapes[npz_key(i, "MultiHeadDotProductAttention_1/out/bias")] = (dim,)
        shapes[npz_key(i, "MlpBlock_3/Dense_0/kernel")] = (dim, mlp)
        shapes[npz_key(i, "MlpBlock_3/Dense_0/bias")] = (mlp,)
        shapes[npz_key(i, "MlpBlock_3/Dense_1/kernel")] = (mlp, dim)
        shapes[npz_key(i, "MlpBlock_3/Dense_1/bias")] = (dim,)
    generator = np.random.default_rng(0)
    return {name: generator.normal(0, 0.3, shape) for name, shape in shapes.items()}


def in_big_vision_names(arrays):
    """Rename arrays of ``vit_jax`` whose class token has no position; nothing else differs."""
    assert not arrays["Transformer/posembed_input/pos_embedding"][:, 0].any()
    renamed = {}
    for name, array in arrays.items():
        if name.endswith("pos_embedding"):
            renamed["pos_embedding"] = array[:, 1:]
            continue
        name = name.replace("LayerNorm_2", "LayerNorm_1").replace("MlpBlock_3", "MlpBlock_0")
        renamed[name.replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")] = array
    return renamed


def official_norm(arrays, name, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]


def official_attention(arrays, name, queries, x):
    q, k, v = (
        np.einsum("td,dhe->the", tokens, arrays[f"{name}/{part}/kernel"]) + arrays[f"{name}/{part}/bias"]
        for part, tokens in (("query", queries), ("key", x), ("value", x))
    )
    scores = np.einsum("the,she->hts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("hts,she->the", weights, v)
    return np.einsum("the,hed->td", mixed, arrays[f"{name}/out/kernel"]) + arrays[f"{name}/out/bias"]


def official_mlp(arrays, name, x):
    h = x @ arrays[f"{name}/Dense_0/kernel"] + arrays[f"{name}/Dense_0/bias"]
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h @ arrays[f"{name}/Dense_1/kernel"] + arrays[f"{name}/Dense_1/bias"]


def official_logits(arrays, image, depth=2):
    """Evaluate the arrays of ``vit_jax`` in numpy, as the paper's equations say and flax lays them out."""
    kernel = arrays["embedding/kernel"]
    size = kernel.shape[0]
    patches = [
        np.einsum("abc,abcd->d", image[i : i + size, j : j + size], kernel) + arrays["embedding/bias"]
        for i in range(0, image.shape[0], size)
        for j in range(0, image.shape[1], size)
    ]
    x = np.concatenate([arrays["cls"][0], np.stack(patches)]) + arrays["Transformer/posembed_input/pos_embedding"][0]
    for i in range(depth):
        y = official_norm(arrays, npz_key(i, "LayerNorm_0"), x)
        x = x + official_attention(arrays, npz_key(i, "MultiHeadDotProductAttention_1"), y, y)
        y = official_norm(arrays, npz_key(i, "LayerNorm_2"), x)
        x = x + official_mlp(arrays, npz_key(i, "MlpBlock_3"), y)
    token = official_norm(arrays, "Transformer/encoder_norm", x)[0]
    token = np.tanh(token @ arrays["pre_logits/kernel"] + arrays["pre_logits/bias"])
    return token @ arrays["head/kernel"] + arrays["head/bias"]


@pytest.mark.parametrize("layout", ["vit_jax", "big_vision", "big_vision_scan"])
def test_logits_equal_those_of_the_official_arrays_computed_in_numpy(tmp_path, layout):
    arrays = saved = official_arrays()
    if layout != "vit_jax":
        arrays["Transformer/posembed_input/pos_embedding"][:, 0] = 0
        saved = in_big_vision_names(arrays)
    if layout == "big_vision_scan":
        first = {name for name in saved if "encoderblock_0" in name}
        saved = {name: array for name, array in saved.items() if "encoderblock_" not in name} | {
            name.replace("_0/", "/", 1): np.stack([saved[name], saved[name.replace("block_0", "block_1")]])
            for name in first
        }
    np.savez(tmp_path / "official.npz", **saved)
    net = network(image_size=(8, 12), representation_size=12, activation="gelu")
    load_pretrained(net, tmp_path / "official.npz")
    image = torch.randn(3, 8, 12, dtype=torch.float64)
    expected = official_logits(arrays, image.permute(1, 2, 0).numpy())
    np.testing.assert_allclose(net(image[None])[0].detach().numpy(), expected, rtol=0, atol=1e-10)
    written = to_official(net.state_dict(), num_heads=2, layout=layout)
    assert written.keys() == saved.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


@pytest.mark.parametrize("layout", ["vit_jax", "big_vision", "big_vision_scan"])
@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_round_trip_through_npz_is_exact(tmp_path, layout, prefix, dtype):
    net = network(pool="mean").to(dtype)
    arrays = to_official(net.state_dict(), num_heads=2, layout=layout)
    around = {"opt/state/step": np.array(7)} if prefix.startswith("opt") else {}  # the optimizer's own is left alone
    np.savez(tmp_path / "net.npz", **{f"{prefix}{name}": array for name, array in arrays.items()}, **around)
    loaded = load_official(tmp_path / "net.npz")
    assert loaded.keys() == net.state_dict().keys()
    for name, weight in net.state_dict().items():
        assert torch.equal(loaded[name], weight), name


def test_big_vision_folds_the_class_token_s_position_into_the_token():
    net = network()
    arrays = to_official(net.state_dict(), num_heads=2, layout="big_vision")
    assert arrays["pos_embedding"].shape == (1, 4, 16)
    loaded = network()
    load_pretrained(loaded, arrays)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(loaded(images), net(images), rtol=0, atol=1e-12)


def test_attention_pooling_of_big_vision_equals_numpy_s():
    net = network(pool="map")
    arrays = to_official(net.state_dict(), num_heads=2, layout="big_vision")
    assert arrays["MAPHead_0/MultiHeadDotProductAttention_0/key/kernel"].shape == (16, 2, 8)
    tokens = torch.randn(5, 16, dtype=torch.float64)
    probe = arrays["MAPHead_0/probe"][0]
    pooled = official_attention(arrays, "MAPHead_0/MultiHeadDotProductAttention_0", probe, tokens.numpy())
    pooled += official_mlp(arrays, "MAPHead_0/MlpBlock_0", official_norm(arrays, "MAPHead_0/LayerNorm_0", pooled))
    np.testing.assert_allclose(net.attn_pool(tokens[None]).detach().numpy(), pooled, rtol=0, atol=1e-10)
    inlined = {name.removeprefix("MAPHead_0/"): array for name, array in arrays.items()}  # the first ViT-G files
    for source in (arrays, inlined):
        loaded = network(pool="map")
        load_pretrained(loaded, source)
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in net.state_dict().items())


def test_bfloat16_arrays_of_jax_are_read(tmp_path):
    weights = torch.randn(4, 6).bfloat16()
    np.savez(tmp_path / "half.npz", **{"head/kernel": weights.view(torch.int16).numpy().view("V2")})
    loaded = load_official(tmp_path / "half.npz")
    assert torch.equal(loaded["head.weight"], weights.T)


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        ((), {"conv_root/kernel", "gn_root/scale", "gn_root/bias"}),
        (
            (1, 2),
            {"conv_root/kernel", "gn_root/scale", "gn_root/bias"}
            | {f"block{b}/unit{u}/conv{i}/kernel" for b, u in ((1, 1), (2, 1), (2, 2)) for i in (1, 2, 3)}
            | {f"block{b}/unit{u}/gn{i}/{p}" for b, u in ((1, 1), (2, 1), (2, 2)) for i in (1, 2, 3)
               for p in ("scale", "bias")}
            | {f"block{b}/unit1/conv_proj/kernel" for b in (1, 2)}
            | {f"block{b}/unit1/gn_proj/{p}" for b in (1, 2) for p in ("scale", "bias")},
        ),
    ],
)  # fmt: skip
def test_a_hybrid_s_stem_has_the_official_keys(layers, keys):
    arguments = {"image_size": 32, "patch_size": 16, "stem": HybridStem(layers, width=32)}
    net = network(**arguments)
    arrays = to_official(net.state_dict(), num_heads=2)
    plain = to_official(network().state_dict(), num_heads=2)
    assert arrays.keys() - plain.keys() == keys
    assert arrays["conv_root/kernel"].shape == (7, 7, 3, 32)
    old = {k: a.reshape(1, 1, 1, -1) if "gn" in k else a for k, a in arrays.items()}  # old files' norms are 4-D
    loaded = network(**{**arguments, "stem": HybridStem(layers, width=32)})
    load_pretrained(loaded, old)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in net.state_dict().items())


def official_stem(layers, width=64):
    """Names and shapes of a hybrid's stem in ``vit_jax``."""
    shapes = {"conv_root/kernel": (7, 7, 3, width), "gn_root/scale": (width,), "gn_root/bias": (width,)}
    before = width
    for block, units in enumerate(layers, start=1):
        middle = width * 2 ** (block - 1)
        for unit in range(1, units + 1):
            at = f"block{block}/unit{unit}"
            sizes = {"1": (1, before, middle), "2": (3, middle, middle), "3": (1, middle, 4 * middle)}
            sizes |= {"_proj": (1, before, 4 * middle)} if unit == 1 else {}
            for suffix, (size, inside, outside) in sizes.items():
                shapes[f"{at}/conv{suffix}/kernel"] = (size, size, inside, outside)
                shapes[f"{at}/gn{suffix}/scale"] = shapes[f"{at}/gn{suffix}/bias"] = (outside,)
            before = 4 * middle
    return shapes


@pytest.mark.parametrize(
    ("variant", "layers", "patch", "features"),
    [
        ("R+Ti/16", (), 8, 64),
        ("R26+S/32", (2, 2, 2, 2), 1, 2048),
        ("R50+B/16", (3, 4, 9), 1, 1024),
        ("R50+L/32", (3, 4, 6, 3), 1, 2048),
    ],
)
def test_the_hybrids_find_every_weight_of_the_official_files(variant, layers, patch, features):
    with torch.device("meta"):
        net = VisionTransformer.from_variant(variant, dim=16, num_heads=2, mlp_dim=24, depth=2, num_classes=3)
        shapes = {name: array.shape for name, array in official_arrays(patches=math.prod(net.grid), hidden=16).items()}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("pre_logits")}
        shapes |= official_stem(layers) | {"embedding/kernel": (patch, patch, features, 16)}
        weights = convert_state_dict({name: torch.empty(shape) for name, shape in shapes.items()})
    expected = {name: weight.shape for name, weight in net.state_dict().items()}
    assert {name: weight.shape for name, weight in weights.items()} == expected


TIMM = """
    cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias head.weight head.bias
    blocks.0.norm1.weight blocks.0.norm1.bias blocks.0.attn.qkv.weight blocks.0.attn.qkv.bias
    blocks.0.attn.proj.weight blocks.0.attn.proj.bias blocks.0.norm2.weight blocks.0.norm2.bias
    blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias
"""
TIMM_POOL = """
    attn_pool.latent attn_pool.q.weight attn_pool.q.bias attn_pool.kv.weight attn_pool.kv.bias attn_pool.proj.weight
    attn_pool.proj.bias attn_pool.norm.weight attn_pool.norm.bias attn_pool.mlp.fc1.weight attn_pool.mlp.fc1.bias
    attn_pool.mlp.fc2.weight attn_pool.mlp.fc2.bias
"""
TIMM_STAGE = """
    stem.conv.weight stem.norm.weight stem.norm.bias
    stages.0.blocks.0.conv1.weight stages.0.blocks.0.norm1.weight stages.0.blocks.0.norm1.bias
    stages.0.blocks.0.conv2.weight stages.0.blocks.0.norm2.weight stages.0.blocks.0.norm2.bias
    stages.0.blocks.0.conv3.weight stages.0.blocks.0.norm3.weight stages.0.blocks.0.norm3.bias
    stages.0.blocks.0.downsample.conv.weight stages.0.blocks.0.downsample.norm.weight
    stages.0.blocks.0.downsample.norm.bias
"""
TIMM_ROOT = "conv.weight norm.weight norm.bias"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, set(TIMM.split())),
        ({"pool": "map"}, set((TIMM + TIMM_POOL).split()) - {"cls_token"}),
        ({"layers": (1,)}, set(TIMM.split()) | {f"patch_embed.backbone.{name}" for name in TIMM_STAGE.split()}),
        ({"layers": ()}, set(TIMM.split()) | {f"patch_embed.backbone.{name}" for name in TIMM_ROOT.split()}),
    ],
)
def test_exported_names_are_timm_s(arguments, names):
    if "layers" in arguments:
        arguments = {"image_size": 32, "patch_size": 16, "stem": HybridStem(arguments["layers"], width=32)}
    state = network(depth=1, **arguments).state_dict()
    exported = to_timm(state)
    assert exported.keys() == names
    back = convert_state_dict(exported, source="timm")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_timm_s_networks_without_a_class_position_get_a_row_of_zeros():
    state = network().state_dict()
    back = convert_state_dict({**state, "pos_embed": state["pos_embed"][:, 1:]}, source="timm")
    assert not back["pos_embed"][:, 0].any()
    assert torch.equal(back["pos_embed"][:, 1:], state["pos_embed"][:, 1:])


# What does not fit


def unchanged(net, state):
    return all(torch.equal(net.state_dict()[name], weight) for name, weight in state.items())


def test_every_key_that_does_not_fit_is_listed_and_nothing_is_loaded():
    net = network()
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    arrays = to_official(network().state_dict(), num_heads=2)
    del arrays[npz_key(1, "LayerNorm_0/scale")]
    del arrays[npz_key(0, "MultiHeadDotProductAttention_1/key/bias")]
    arrays["surplus/kernel"] = np.zeros((2, 2))
    arrays["cls"] = np.zeros((1, 1, 8))
    with pytest.raises(ValueError, match="does not fit the network") as error:
        load_pretrained(net, arrays)
    message = str(error.value)
    for line in (
        f"missing: blocks.1.norm1.weight ({npz_key(1, 'LayerNorm_0/scale')})",
        "unexpected: surplus/kernel",
        "shape of cls_token (cls): expected (1, 1, 16), got (1, 1, 8)",
        npz_key(0, "MultiHeadDotProductAttention_1/key/bias"),
    ):
        assert line in message
    assert unchanged(net, before)


def test_a_head_of_other_classes_is_left_out_on_request_only():
    weights = network(num_classes=7).state_dict()
    net = network()
    with pytest.raises(ValueError, match=r"(?s)shape of head.weight.*pass reset_head=True") as error:
        load_pretrained(net, weights, source="ours")
    assert "expected (3, 16), got (7, 16)" in str(error.value)
    load_pretrained(net, weights, source="ours", reset_head=True)
    assert net.head.weight.count_nonzero() == 0
    assert torch.equal(net.norm.weight, weights["norm.weight"])


def test_fine_tuning_drops_the_hidden_tanh_layer():
    net = network()
    load_pretrained(net, to_official(network(representation_size=5).state_dict(), 2), reset_head=True)
    assert net.head.weight.count_nonzero() == 0


def test_a_hidden_tanh_layer_of_the_same_shape_stays_with_a_new_head():
    net, arrays = network(representation_size=5), to_official(network(representation_size=5).state_dict(), 2)
    load_pretrained(net, arrays, reset_head=True)
    np.testing.assert_array_equal(net.pre_logits.weight.detach().numpy().T, arrays["pre_logits/kernel"])
    assert net.head.weight.count_nonzero() == 0


def test_positions_are_resized_to_the_network_s_grid():
    weights = network().state_dict()
    net = network(image_size=(16, 12))
    load_pretrained(net, weights, source="ours")
    corner = weights["pos_embed"][0, [1, 2, 3, 4]]
    grid = net.pos_embed[0, 1:].view(4, 3, 16)
    torch.testing.assert_close(grid[[0, 0, -1, -1], [0, -1, 0, -1]], corner)
    assert torch.equal(net.pos_embed[0, 0], weights["pos_embed"][0, 0])


def test_a_grid_that_is_no_square_has_to_be_given():
    weights = network(image_size=(8, 12)).state_dict()
    net = network(image_size=(16, 12))
    with pytest.raises(ValueError, match=r"pos_embed: its 6 patches fit no square.*pass old_grid=\(h, w\)"):
        load_pretrained(net, weights, source="ours")
    load_pretrained(net, weights, source="ours", old_grid=(2, 3))


@pytest.mark.parametrize(("layout", "size"), [("timm", (20, 40)), ("big_vision", (24, 32))])
def test_a_row_that_may_be_a_patch_s_or_the_class_token_s_needs_the_old_grid(layout, size):
    # 7 x 7 patches: timm's 50 rows could be 5 x 10 patches alone, big_vision's 49 could be 6 x 8 and a class token.
    old, net = network(image_size=28), network(image_size=size)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    weights = to_timm(old.state_dict()) if layout == "timm" else to_official(old.state_dict(), 2, layout)
    with pytest.raises(ValueError, match=r"pos_embed: one of its (49|50) rows may be .* pass old_grid=\(h, w\)"):
        load_pretrained(net, weights)
    assert unchanged(net, before)
    load_pretrained(net, weights, old_grid=(7, 7))
    corners = net.pos_embed[0, 1:].view(*net.grid, 16)[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, old.pos_embed[0, [1, 7, 43, 49]])


def test_positions_are_resized_as_the_network_does_it_or_as_asked():
    weights = network().state_dict()
    for arguments, mode in (({}, "bilinear"), ({"position_mode": "bicubic"}, "bicubic")):
        net = network(image_size=(16, 12), position_mode="bilinear")
        load_pretrained(net, weights, source="ours", **arguments)
        expected = resize_position_embedding(weights["pos_embed"], (2, 2), (4, 3), mode=mode)
        torch.testing.assert_close(net.pos_embed.detach(), expected)


def test_fixed_positions_stay_the_network_s_own():
    small, large = (network(position="sincos2d", pool="mean", image_size=size) for size in (8, 16))
    before = large.pos_embed.clone()
    load_pretrained(large, small.state_dict(), source="ours")
    assert torch.equal(large.pos_embed, before)
    learned = network(position="learned", pool="mean").state_dict()
    with pytest.raises(ValueError, match=r"fixed positions \(sincos2d\), the checkpoint learned ones"):
        load_pretrained(large, learned, source="ours")


def test_fixed_positions_need_none_in_the_file():
    net = network(position="sincos2d", pool="mean")
    before = net.pos_embed.clone()
    arrays = to_official(network(position="none", pool="mean").state_dict(), num_heads=2, layout="big_vision")
    assert "pos_embedding" not in arrays
    load_pretrained(net, arrays)
    assert torch.equal(net.pos_embed, before)


def test_another_number_of_heads_is_noticed():
    arrays = to_official(network(num_heads=4).state_dict(), num_heads=4)
    with pytest.raises(ValueError, match=r"num_heads: expected 2, got \[4\]"):
        load_pretrained(network(), arrays)


@pytest.mark.parametrize(
    ("build", "num_classes", "prefix"),
    [(ViTClassifier, 3, "net."), (MaskedPatchPretraining, 0, "pretext.encoder.")],
)
def test_checkpoints_of_our_modules_start_a_network(tmp_path, build, num_classes, prefix):
    module = build(VisionTransformer(**{**SIZES, "num_classes": num_classes}))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert f"{prefix}blocks.0.norm1.bias" in module.state_dict()
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    net = VisionTransformer(**SIZES)
    load_pretrained(net, tmp_path / "ours.ckpt", reset_head=True)
    for name, weight in module.net.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(net.state_dict()[name], weight), name


def test_the_activation_follows_the_weights():
    kinds = lambda net: {block.mlp.act.approximate for block in net.blocks}  # noqa: E731
    net = network()
    assert kinds(net) == {"tanh"}
    load_pretrained(net, to_hf(network().state_dict()))
    assert kinds(net) == {"none"}
    load_pretrained(net, to_official(network().state_dict(), 2))
    assert kinds(net) == {"tanh"}


# Files


@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"net.{suffix}"
    if suffix == "npz":
        np.savez(path, **to_official(network().state_dict(), 2))
    else:
        torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*truncated"):
        load_pretrained(network(), path)


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", cls=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="evil.npz is not a readable .npz archive"):
        load_official(tmp_path / "evil.npz")
    with warnings.catch_warnings():
        torch.save({"state_dict": pytest.approx(1)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt cannot be read as tensors"):
        load_pretrained(network(), tmp_path / "evil.pt")


@pytest.mark.parametrize("name", ["no.npz", "no.pt", "no.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load_pretrained(network(), tmp_path / name)


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    saved, net = network(), network()
    assert not torch.equal(net.patch_embed.proj.weight, saved.patch_embed.proj.weight)
    weights = {name: weight.contiguous() for name, weight in to_hf(saved.state_dict()).items()}
    save_file(weights, tmp_path / "model.safetensors")
    load_pretrained(net, tmp_path / "model.safetensors")
    torch.testing.assert_close(net.state_dict(), saved.state_dict(), rtol=0, atol=0)


def hybrid():
    return network(image_size=32, patch_size=16, stem=HybridStem((), width=32)).state_dict()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: convert_state_dict({"weight": torch.zeros(2)}), ValueError, "cannot tell the source"),
        (lambda: convert_state_dict({}, source="flax"), ValueError, "source must be one of .*got 'flax'"),
        (lambda: convert_state_dict({"blocks.0.norm1.bias": 3}), TypeError, "blocks.0.norm1.bias must be a tensor"),
        (lambda: load_pretrained(nn.Linear(2, 2), {}), TypeError, "model must be a VisionTransformer, got Linear"),
        (lambda: load_pretrained(network(), "net.txt"), ValueError, "checkpoint must end in .npz"),
        (lambda: to_official(network().state_dict(), num_heads=3), ValueError, "num_heads must divide the width 16"),
        (lambda: to_hf(network(pool="mean").state_dict()), ValueError, r"lacks \['cls_token'\]"),
        (lambda: to_hf(network().state_dict(), version=3), ValueError, "version must be 4 or 5, got 3"),
        (lambda: to_hf(hybrid()), ValueError, "no weight like patch_embed.backbone.stem.conv.weight"),
        (lambda: to_hf(network(representation_size=4).state_dict()), ValueError, "has no hidden tanh layer"),
        (lambda: to_official(hybrid(), 2, "big_vision"), ValueError, "'big_vision' has no weight like patch_embed.b"),
        (
            lambda: to_official(network(pool="map").state_dict(), 2),
            ValueError,
            "'vit_jax' has no weight like attn_pool",
        ),
        (lambda: to_official(network().state_dict(), 2, "flax"), ValueError, "layout must be one of .*got 'flax'"),
        (lambda: to_timm(network(representation_size=4).state_dict()), ValueError, "timm has no hidden tanh layer"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
