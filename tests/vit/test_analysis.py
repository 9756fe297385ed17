import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from lightning_iclr.vit import VisionTransformer, to_hf
from lightning_iclr.vit.analysis import attention_distance, attention_maps, patch_filters, position_similarity, rollout

TINY = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24}


def randomised(**arguments):
    net = VisionTransformer(**{**TINY, **arguments}).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def random_maps(layers=3, batch=2, heads=4, tokens=7):
    return [torch.randn(batch, heads, tokens, tokens, dtype=torch.float64).softmax(dim=-1) for _ in range(layers)]


def hugging_face_twin(net, implementation="eager"):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        image_size=8,
        patch_size=4,
        num_labels=3,
        attn_implementation=implementation,
    )
    theirs = ViTForImageClassification(config).double().eval()
    theirs.load_state_dict(to_hf(net.state_dict()))
    return theirs


def test_attention_maps_equal_those_of_hugging_face():
    net, images = randomised(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = hugging_face_twin(net)(images, output_attentions=True).attentions
    # Hugging Face takes the softmax of its eager attention in float32, whatever the rest is computed in.
    torch.testing.assert_close(attention_maps(net, images), list(expected), rtol=0, atol=1e-6, check_dtype=False)


def test_attention_maps_of_a_hugging_face_model_are_the_attentions_it_returns():
    net, images = randomised(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    maps = attention_maps(hugging_face_twin(net), images)
    torch.testing.assert_close(maps, attention_maps(net, images), rtol=0, atol=1e-6, check_dtype=False)


def test_a_hugging_face_model_with_fused_attention_has_no_maps():
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        attention_maps(hugging_face_twin(randomised(), "sdpa"), torch.zeros(1, 3, 8, 8, dtype=torch.float64))


class ForeignAttention(nn.Module):
    """As timm writes it, with norms on queries and keys, and the maps kept for comparison."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        self.map = torch.softmax(self.q_norm(q) @ self.k_norm(k).mT / math.sqrt(self.head_dim), dim=-1)
        return self.proj((self.map @ v).transpose(1, 2).reshape(b, t, d))


def test_attention_maps_of_a_foreign_network_with_fused_projections_are_its_own():
    net = nn.Sequential(ForeignAttention(12, 3), nn.GELU(), ForeignAttention(12, 2)).double()
    maps = attention_maps(net, torch.randn(2, 5, 12, dtype=torch.float64))
    assert [m.shape for m in maps] == [(2, 3, 5, 5), (2, 2, 5, 5)]
    torch.testing.assert_close(maps, [net[0].map, net[2].map], rtol=0, atol=1e-12)


def test_a_foreign_attention_with_a_bias_of_its_own_is_refused():
    net = ForeignAttention(12, 3)
    net.relative_position_bias_table = nn.Parameter(torch.zeros(9, 3))
    with pytest.raises(ValueError, match="relative_position_bias_table"):
        attention_maps(net, torch.randn(2, 5, 12))


class Uniform(nn.Module):
    def forward(self, q, k, v):
        return v.mean(dim=2, keepdim=True).expand_as(q)


def test_a_pluggable_attention_has_no_maps():
    net = VisionTransformer(**TINY, attention=lambda dim, heads: Uniform())
    with pytest.raises(ValueError, match="model must have softmax attention; Uniform has no attention maps"):
        attention_maps(net, torch.zeros(1, 3, 8, 8))


def test_a_network_without_attention_has_no_maps():
    with pytest.raises(ValueError, match="model must be a VisionTransformer.*Linear does not"):
        attention_maps(nn.Linear(4, 2), torch.zeros(1, 4))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_network_has_the_same_maps(in_place):
    net, images = randomised(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = attention_maps(net, images)
    torch._dynamo.reset()
    if in_place:
        net.compile(backend="eager")
        compiled = net
    else:
        compiled = torch.compile(net, backend="eager")
    compiled(images)  # compiles before there are hooks
    torch.testing.assert_close(attention_maps(compiled, images), expected, rtol=0, atol=0)


def test_attention_maps_leave_no_hooks_behind_even_after_an_error():
    net = randomised()
    with pytest.raises(ValueError, match="channels"):
        attention_maps(net, torch.zeros(1, 5, 8, 8, dtype=torch.float64))
    attention_maps(net, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("prefix", [0, 1])
def test_attention_distance_equals_a_loop_over_queries_and_keys(prefix, renormalize):
    grid, patch = (2, 3), (4, 6)
    maps = random_maps(tokens=prefix + 6)
    expected = np.zeros((3, 4))
    for layer, attention in enumerate(maps):
        for head in range(4):
            distances = []
            for image in range(2):
                for query in range(6):
                    row = attention[image, head, prefix + query, prefix:].tolist()
                    whole = sum(row) if renormalize else 1.0
                    distance = 0.0
                    for key in range(6):
                        dy = (query // 3 - key // 3) * patch[0]
                        dx = (query % 3 - key % 3) * patch[1]
                        distance += row[key] / whole * math.hypot(dy, dx)
                    distances.append(distance)
            expected[layer, head] = np.mean(distances)
    ours = attention_distance(maps, grid, patch, renormalize)
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_attention_to_oneself_has_distance_zero():
    identity = torch.eye(13).expand(2, 3, 13, 13)
    assert torch.equal(attention_distance([identity, identity], (3, 4), 16), torch.zeros(2, 3))


@pytest.mark.parametrize(("renormalize", "expected"), [(False, 115.90), (True, 116.49)])
def test_uniform_attention_on_14_by_14_patches_has_the_known_distance(renormalize, expected):
    uniform = torch.full((1, 1, 197, 197), 1 / 197, dtype=torch.float64)
    assert float(attention_distance([uniform], (14, 14), 16, renormalize)) == pytest.approx(expected, abs=0.005)


def test_attention_distance_refuses_a_grid_of_more_patches_than_tokens():
    with pytest.raises(ValueError, match=r"grid \(3, 3\) must have at most the maps' 7 tokens"):
        attention_distance(random_maps(), (3, 3), 4)
    with pytest.raises(ValueError, match="maps must hold at least one block's attention"):
        attention_distance([], (3, 3), 4)


def test_rollout_of_attention_to_oneself_is_the_identity():
    identity = torch.eye(5).expand(2, 3, 5, 5)
    assert torch.equal(rollout([identity] * 4), torch.eye(5).expand(2, 5, 5))


def test_rollout_equals_a_loop():
    maps = random_maps()
    for image in range(2):
        total = np.eye(7)
        for attention in maps:
            mixed = np.zeros((7, 7))
            for i in range(7):
                row = [sum(float(attention[image, head, i, j]) for head in range(4)) / 4 + (i == j) for j in range(7)]
                mixed[i] = np.array(row) / sum(row)
            total = mixed @ total
        torch.testing.assert_close(rollout(maps)[image], torch.from_numpy(total), rtol=0, atol=1e-12)


def test_rows_of_the_rollout_sum_to_one():
    sums = rollout(random_maps(layers=12)).sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)


def test_rollout_refuses_no_maps():
    with pytest.raises(ValueError, match="maps must hold at least one block's attention, got none"):
        rollout([])


@pytest.mark.parametrize("prefix", [0, 1])
def test_position_similarity_is_the_cosine_of_the_patches_embeddings(prefix):
    positions = torch.randn(1, prefix + 6, 8, dtype=torch.float64)
    expected = cosine_similarity(positions[0, prefix:].numpy()).reshape(2, 3, 2, 3)
    ours = position_similarity(positions, (2, 3))
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_position_similarity_refuses_too_few_rows():
    with pytest.raises(ValueError, match="must have a row for each of 9 patches, got 6"):
        position_similarity(torch.randn(1, 6, 8), (3, 3))


def test_patch_filters_are_the_principal_components():
    weight = torch.randn(40, 3, 2, 4, dtype=torch.float64) * torch.linspace(1, 3, 4, dtype=torch.float64)
    theirs = PCA(n_components=5, svd_solver="full").fit(weight.flatten(1).numpy()).components_
    ours = patch_filters(weight, n=5)
    assert ours.shape == (5, 3, 2, 4)
    cosines = (ours.flatten(1) * torch.from_numpy(theirs)).sum(dim=1)
    torch.testing.assert_close(cosines.abs(), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-9)
    assert all(component.flatten()[component.abs().argmax()] > 0 for component in ours)


def test_patch_filters_are_at_most_as_many_as_there_are_pixels():
    assert patch_filters(torch.randn(40, 1, 2, 2)).shape == (4, 1, 2, 2)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        patch_filters(torch.randn(40, 1, 2, 2), n=0)
