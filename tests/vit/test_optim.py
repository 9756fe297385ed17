import pytest
import torch
from torch import nn

from lightning_iclr.vit import HybridStem, MaskedPatchPretraining, VisionTransformer, ViTClassifier
from lightning_iclr.vit.optim import param_groups, scale_learning_rates

SIZES = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize(
    "net",
    [
        VisionTransformer(**SIZES, representation_size=8),
        VisionTransformer(**SIZES, pool="map"),
        VisionTransformer(**{**SIZES, "image_size": 32, "patch_size": 16}, stem=HybridStem((1, 1, 1), width=32)),
    ],
)
def test_exactly_the_matrices_and_convolutions_are_decayed(net):
    decayed, rest = sorted(param_groups(net), key=len)
    assert "weight_decay" not in decayed
    assert rest["weight_decay"] == 0.0
    names = {id(p): name for name, p in net.named_parameters()}
    assert {p.ndim for p in decayed["params"]} <= {2, 4}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    kept = {names[id(p)].rpartition(".")[2] for p in rest["params"]} - {"bias", "weight"}
    assert kept <= {"pos_embed", "cls_token", "latent"}
    assert all(p.ndim in (1, 3) for p in rest["params"])


@pytest.mark.parametrize("arguments", [{}, {"kdim": 6, "vdim": 4}])
def test_the_kernels_of_torch_s_own_attention_are_decayed(arguments):
    net = nn.MultiheadAttention(8, 2, add_bias_kv=True, **arguments)
    decayed, rest = param_groups(net)
    names = {id(p): name for name, p in net.named_parameters()}
    kernels = {name for name in names.values() if name.endswith("weight")}
    assert {names[id(p)] for p in decayed["params"]} == kernels >= {"out_proj.weight"}
    assert {names[id(p)] for p in rest["params"]} == {"in_proj_bias", "out_proj.bias", "bias_k", "bias_v"}


def test_a_mask_token_is_not_decayed():
    module = MaskedPatchPretraining(VisionTransformer(**{**SIZES, "num_classes": 0}))
    _, rest = sorted(param_groups(module), key=len)
    assert any(p is module.pretext.mask_token for p in rest["params"])


def test_layer_decay_shrinks_the_rate_from_block_to_block():
    net = VisionTransformer(**SIZES)
    groups = param_groups(net, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(net.head.weight)] == scale[id(net.norm.weight)] == 1.0
    assert [scale[id(block.mlp.fc1.weight)] for block in net.blocks] == [0.125, 0.25, 0.5]
    for parameter in (net.patch_embed.proj.weight, net.pos_embed, net.cls_token):
        assert scale[id(parameter)] == 0.0625


def test_a_hybrid_s_stem_counts_as_one_layer_however_many_blocks_it_has():
    stem = HybridStem((3,), width=32)
    net = VisionTransformer(**{**SIZES, "image_size": 32, "patch_size": 16, "depth": 1}, stem=stem)
    groups = param_groups(net, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scale[id(p)] for p in net.patch_embed.parameters()} == {0.25}
    assert {scale[id(p)] for p in net.blocks.parameters()} == {0.5}
    assert scale[id(net.head.weight)] == 1.0


def test_layer_decay_reaches_the_optimizer_and_its_schedule():
    module = ViTClassifier(
        VisionTransformer(**SIZES),
        layer_decay=0.5,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.8),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
    )
    configured = module.configure_optimizers()
    rates = lambda: {round(group["lr"], 10) for group in configured["optimizer"].param_groups}  # noqa: E731
    assert rates() == {0.8, 0.4, 0.2, 0.1, 0.05}
    configured["optimizer"].step()
    configured["lr_scheduler"]["scheduler"].step()
    assert rates() == {0.4, 0.2, 0.1, 0.05, 0.025}


def test_frozen_parameters_are_left_out():
    net = VisionTransformer(**SIZES)
    net.patch_embed.requires_grad_(False)
    members = {id(p) for group in param_groups(net) for p in group["params"]}
    assert id(net.patch_embed.proj.weight) not in members


def test_bad_decays_are_named():
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], got 0.0"):
        param_groups(VisionTransformer(**SIZES), layer_decay=0.0)
    with pytest.raises(
        ValueError, match="layer_decay must be 1 for a model without parameters named blocks.i, got 0.9"
    ):
        param_groups(nn.Linear(2, 2), layer_decay=0.9)


def test_scaling_without_layer_decay_changes_nothing():
    optimizer = torch.optim.SGD(param_groups(nn.Linear(2, 2)), lr=0.3)
    scale_learning_rates(optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
