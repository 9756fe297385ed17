import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_iclr.transformer import MLP, Attention, DropPath, EncoderBlock


class SlowSoftmax(nn.Module):
    def forward(self, q, k, v):
        out = torch.empty_like(v)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                for i in range(q.shape[2]):
                    scores = torch.stack([q[b, h, i] @ k[b, h, j] for j in range(k.shape[2])]) / math.sqrt(q.shape[3])
                    weights = scores.exp() / scores.exp().sum()
                    out[b, h, i] = sum(weights[j] * v[b, h, j] for j in range(k.shape[2]))
        return out


def test_softmax_attention_equals_a_loop_over_heads_queries_and_keys():
    fused = Attention(dim=6, num_heads=2).double()
    slow = Attention(dim=6, num_heads=2, attention=SlowSoftmax()).double()
    slow.load_state_dict(fused.state_dict())
    tokens = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(tokens), slow(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_block_equals_torchs_encoder_layer_with_the_same_weights(norm_first, activation):
    block = EncoderBlock(8, 2, 12, norm_first=norm_first, activation=activation).double()
    theirs = nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first, layer_norm_eps=1e-6
    ).double()
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        module, _, kind = name.rpartition(".")
        target = f"self_attn.in_proj_{kind}" if module == "attn.qkv" else f"{names[module]}.{kind}"
        theirs.get_parameter(target).data.copy_(parameter.data)
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(block(tokens), theirs(tokens), rtol=0, atol=1e-12)


def test_tanh_activation_is_the_approximation_of_hendrycks_and_gimpel():
    mlp = MLP(1, 1, activation="gelu_tanh").double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.fill_(1.0)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(-1)
    y = x + 1
    expected = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) + 1
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-12)


def test_dropped_path_keeps_the_mean_and_drops_whole_samples():
    n, p = 20_000, 0.3
    out = DropPath(p).train()(torch.ones(n, 2))
    assert torch.equal(out[:, 0], out[:, 1])
    kept = (out[:, 0] > 0).double().mean().item()
    assert abs(kept - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)
    torch.testing.assert_close(out.max(), torch.tensor(1 / (1 - p)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_both_branches_of_a_block_are_dropped(norm_first):
    block = EncoderBlock(8, 2, norm_first=norm_first, drop_path=0.999).train()
    tokens = torch.randn(4, 5, 8)
    expected = tokens if norm_first else block.norm2(block.norm1(tokens))
    torch.testing.assert_close(block(tokens), expected, rtol=0, atol=0)  # the seed keeps none of the eight


def test_dropout_sits_after_attention_and_twice_in_the_mlp(monkeypatch):
    shapes = []
    real = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p, t, i: shapes.append((x.shape[-1], p)) or real(x, 0.0, t, i))
    EncoderBlock(4, 2, 6, dropout=0.1).train()(torch.zeros(1, 3, 4))
    assert shapes == [(4, 0.1), (6, 0.1), (4, 0.1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim, got num_heads 3 and dim 8"),
        ({"activation": "swish"}, "activation must be 'gelu', 'gelu_tanh' or 'relu', got 'swish'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EncoderBlock(**{"dim": 8, "num_heads": 2, **arguments})
