import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_iclr.fedopt.model import (
    CharacterLSTM,
    DigitsConvNet,
    EMNISTAutoencoder,
    EMNISTConvNet,
    ResNet18,
    StackOverflowLSTM,
    TagClassifier,
)
from lightning_iclr.fedopt.normalization import replace_batch_norm

EXACT = {"rtol": 0, "atol": 1e-10}


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


# Sizes


def dense(inputs, outputs):
    return inputs * outputs + outputs


def lstm(inputs, units):
    return 4 * (inputs + units + 1) * units


@pytest.mark.parametrize(
    ("build", "published", "layers"),
    [
        (EMNISTConvNet, 1_206_590, [10 * 32, (9 * 32 + 1) * 64, dense(9216, 128), dense(128, 62)]),
        (
            EMNISTAutoencoder,
            2_837_314,
            [785_000, 500_500, 125_250, 7_530, 7_750, 125_500, 501_000, 784_784],
        ),
        (CharacterLSTM, 820_522, [90 * 8, lstm(8, 256), lstm(256, 256), dense(256, 90)]),
        (StackOverflowLSTM, 4_050_748, [10_004 * 96, lstm(96, 670), dense(670, 96), dense(96, 10_004)]),
        (lambda: StackOverflowLSTM(tied=True), 3_080_360, [10_004 * 96, lstm(96, 670), dense(670, 96)]),
        (TagClassifier, 5_000_500, [dense(10_000, 500)]),
        (DigitsConvNet, 4_538, [10 * 8, dense(128, 32), dense(32, 10)]),
    ],
)
def test_networks_have_the_published_number_of_parameters_layer_by_layer(build, published, layers):
    assert count(build()) == published == sum(layers)


@pytest.mark.parametrize(("num_classes", "documented"), [(100, 11_227_812), (10, 11_181_642)])
def test_the_resnet_has_the_parameters_of_eight_blocks_a_stem_and_a_head(num_classes, documented):
    expected = 7 * 7 * 3 * 64 + 2 * 64
    width = 64
    for channels in (64, 128, 256, 512):
        for block in range(2):
            first_of_all = channels == 64 and block == 0
            expected += 0 if first_of_all else 2 * width
            expected += 9 * width * channels + 2 * channels + 9 * channels * channels
            expected += width * channels + 2 * channels if width != channels else 0
            width = channels
    expected += 2 * 512 + dense(512, num_classes)
    with torch.device("meta"):
        assert count(ResNet18(num_classes)) == documented == expected


# Forward passes against the same mathematics written out


def group_norm(images, norm, groups):
    """Normalise over each group of channels and all pixels; Keras adds 1e-3 to the variance."""
    grouped = images.reshape(len(images), groups, -1)
    centred = grouped - grouped.mean(dim=2, keepdim=True)
    variance = centred.square().mean(dim=2, keepdim=True)
    normal = (centred / (variance + 1e-3).sqrt()).reshape(images.shape)
    return normal * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def jitter(net):
    """Move scales, shifts and biases off their special starting values."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize(
    ("size", "stem_pads", "pool_pads"), [(24, (2, 3), (0, 1)), (25, (3, 3), (1, 1))], ids=["24", "25"]
)
def test_the_resnet_equals_its_layers_written_out(size, stem_pads, pool_pads):
    net = jitter(ResNet18(10, num_groups=4)).double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    x = F.conv2d(F.pad(images, stem_pads * 2), net.stem.weight, stride=2)
    x = F.relu(group_norm(x, net.stem_norm, 4))
    x = F.max_pool2d(F.pad(x, pool_pads * 2, value=-math.inf), 3, 2)
    reduced = math.ceil(math.ceil(size / 2) / 2)
    assert x.shape[-2:] == (reduced, reduced)
    for number, block in enumerate(net.blocks):
        shortcut, branch = x, x
        if number > 0:
            branch = F.relu(group_norm(branch, block.norm1, 4))
        branch = F.conv2d(branch, block.conv1.weight, padding=1)
        branch = F.conv2d(F.relu(group_norm(branch, block.norm2, 4)), block.conv2.weight, padding=1)
        if number in (2, 4, 6):
            shortcut = torch.einsum("bchw,oc->bohw", x, block.shortcut[0].weight[:, :, 0, 0])
            shortcut = group_norm(shortcut, block.shortcut[1], 4)
        x = shortcut + branch
        assert x.shape[-2:] == (reduced, reduced)
    x = F.relu(group_norm(x, net.norm, 4)).mean(dim=(2, 3))
    torch.testing.assert_close(net(images), x @ net.head.weight.T + net.head.bias, **EXACT)


def convolve(images, conv):
    """Convolve with a 3x3 kernel by a product of matrices, then cut off what is negative."""
    padding = conv.padding[0]
    patches = F.unfold(images, kernel_size=3, padding=padding).transpose(1, 2)
    out = patches @ conv.weight.flatten(1).T + conv.bias
    rows, columns = (n + 2 * padding - 2 for n in images.shape[-2:])
    return out.transpose(1, 2).reshape(len(images), -1, rows, columns).clamp(min=0)


def pool(images):
    corners = [images[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(corners).amax(dim=0)


def apply(linear, inputs):
    return inputs @ linear.weight.T + linear.bias


def test_the_emnist_network_equals_its_layers_written_out():
    net = jitter(EMNISTConvNet()).double().eval()
    images = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    features = pool(convolve(convolve(images, net.conv1), net.conv2))
    assert features.shape == (2, 64, 12, 12)
    hidden = apply(net.hidden, features.flatten(1)).clamp(min=0)
    torch.testing.assert_close(net(images), apply(net.head, hidden), **EXACT)


def test_the_emnist_network_drops_a_quarter_of_the_features_and_half_of_the_hidden_units():
    net = EMNISTConvNet()
    shares = {}
    for name in ("hidden", "head"):
        layer = getattr(net, name)
        with torch.no_grad():
            net.conv1.bias.fill_(5.0)
            net.conv2.bias.fill_(50.0)
            net.hidden.bias.fill_(500.0)  # all units are on, so that a zero was dropped
        layer.register_forward_pre_hook(lambda _, inputs, name=name: shares.update({name: inputs[0]}))
    net(torch.rand(64, 1, 28, 28))
    for name, rate in (("hidden", 0.25), ("head", 0.5)):
        zero = (shares[name] == 0).float()
        assert abs(zero.mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / zero.numel())


def test_the_digits_network_equals_its_layers_written_out():
    net = DigitsConvNet().double()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    features = pool(convolve(images, net.conv)).flatten(1)
    expected = apply(net.head, apply(net.hidden, features).clamp(min=0))
    torch.testing.assert_close(net(images), expected, **EXACT)


def test_the_autoencoder_equals_eight_matrices_with_sigmoids_around_a_linear_code():
    net = jitter(EMNISTAutoencoder()).double()
    images = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    weights = [
        (p.T, net.get_parameter(name.replace("weight", "bias"))) for name, p in net.named_parameters() if p.ndim > 1
    ]
    assert [tuple(w.shape) for w, _ in weights] == [
        (784, 1000),
        (1000, 500),
        (500, 250),
        (250, 30),
        (30, 250),
        (250, 500),
        (500, 1000),
        (1000, 784),
    ]
    x = images.reshape(2, 784)
    for layer, (weight, bias) in enumerate(weights):
        x = x @ weight + bias
        if layer == 3:
            torch.testing.assert_close(net.encode(images), x, **EXACT)
        else:
            x = 1 / (1 + torch.exp(-x))
    torch.testing.assert_close(net(images), x.reshape(2, 1, 28, 28), **EXACT)


def test_an_autoencoder_of_other_widths_mirrors_them():
    net = EMNISTAutoencoder(input_dim=64, hidden_dims=[20], code_dim=3)
    assert [tuple(p.shape) for p in net.parameters() if p.ndim > 1] == [(20, 64), (3, 20), (20, 3), (64, 20)]
    assert isinstance(net.encoder[-1], nn.Linear)


def keras_lstm(inputs, kernel, recurrent, bias):
    """Run the equations of Keras's LSTM, whose gates are input, forget, cell and output, with one bias each."""
    units = len(recurrent)
    state = cell = inputs.new_zeros(len(inputs), units)
    states = []
    for step in range(inputs.shape[1]):
        gates = inputs[:, step] @ kernel + state @ recurrent + bias
        i, f, c, o = (gates[:, k * units : (k + 1) * units] for k in range(4))
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(c)
        state = torch.sigmoid(o) * torch.tanh(cell)
        states.append(state)
    return torch.stack(states, dim=1)


def keras_weights(layer):
    return layer.weight_ih_l0.T, layer.weight_hh_l0.T, layer.bias_ih_l0


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_character_lstm_equals_keras_equations_step_by_step(num_layers):
    net = jitter(CharacterLSTM(11, embedding_dim=3, hidden_dim=5, num_layers=num_layers)).double()
    tokens = torch.randint(11, (4, 7))
    states = net.embedding.weight[tokens]
    for layer in net.lstms:
        states = keras_lstm(states, *keras_weights(layer))
    assert len(net.lstms) == num_layers
    torch.testing.assert_close(net(tokens), apply(net.head, states), **EXACT)


@pytest.mark.parametrize("tied", [False, True])
def test_the_word_lstm_projects_its_state_and_scores_all_words(tied):
    net = jitter(StackOverflowLSTM(11, embedding_dim=3, hidden_dim=5, tied=tied)).double()
    tokens = torch.randint(11, (4, 7))
    embedding = net.embedding.weight
    projected = apply(net.projection, keras_lstm(embedding[tokens], *keras_weights(net.lstm)))
    expected = projected @ embedding.T if tied else apply(net.head, projected)
    torch.testing.assert_close(net(tokens), expected, **EXACT)


def test_the_tag_classifier_is_one_matrix():
    net = jitter(TagClassifier(30, 4)).double()
    words = torch.rand(5, 30, dtype=torch.float64)
    torch.testing.assert_close(net(words), apply(net.head, words), **EXACT)


# One bias a gate


def test_a_step_of_sgd_moves_the_one_bias_as_in_keras():
    net = CharacterLSTM(11, embedding_dim=3, hidden_dim=5, num_layers=1).double()
    tokens = torch.randint(11, (4, 7))
    weights = [w.detach().clone().requires_grad_() for w in keras_weights(net.lstms[0])]
    reference = keras_lstm(net.embedding.weight.detach()[tokens], *weights)
    (reference @ net.head.weight.detach().T).square().sum().backward()
    (net(tokens) - net.head.bias).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    moved = keras_weights(net.lstms[0])
    for after, before in zip(moved, weights, strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad, **EXACT)
    assert net.lstms[0].bias_hh_l0.count_nonzero() == 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_the_fixed_bias_is_no_parameter_is_not_saved_and_survives_copies(clone):
    net = CharacterLSTM(11, embedding_dim=3, hidden_dim=5)
    names = {name for name in net.state_dict() if "bias_hh" in name}
    assert names == set()
    twin = clone(net).double()
    twin.load_state_dict({name: 2 * tensor for name, tensor in net.state_dict().items()})
    tokens = torch.randint(11, (2, 4))
    states = twin.embedding.weight[tokens]
    for layer in twin.lstms:
        states = keras_lstm(states, *keras_weights(layer))
    torch.testing.assert_close(twin(tokens), apply(twin.head, states), **EXACT)


def test_an_lstm_takes_other_weights_in_a_functional_call():
    net, other = (CharacterLSTM(11, embedding_dim=3, hidden_dim=5) for _ in range(2))
    tokens = torch.randint(11, (2, 4))
    called = functional_call(net, dict(other.named_parameters()), (tokens,))
    torch.testing.assert_close(called, other(tokens), rtol=0, atol=0)
    assert not torch.equal(called, net(tokens))


# Initial weights


def assert_uniform(weight, limit):
    n = weight.numel()
    assert weight.abs().max() <= limit
    assert weight.abs().max() > limit * (1 - 20 / n)  # all n draws below it: (1 - 20/n)^n < e^-20
    assert abs(weight.mean()) < 4 * limit / math.sqrt(3 * n)
    # The square of a uniform variable on [-l, l] has mean l^2 / 3 and variance 4 l^4 / 45.
    assert abs(weight.square().mean() - limit**2 / 3) < 4 * limit**2 * math.sqrt(4 / (45 * n))


def assert_normal(weight, std, cut=None):
    n = weight.numel()
    assert abs(weight.mean()) < 4 * std / math.sqrt(n)
    # A normal variable's square has variance 2 std^4; cut off, it has less.
    assert abs(weight.square().mean() - std**2) < 4 * std**2 * math.sqrt(2 / n)
    if cut is not None:
        assert weight.abs().max() <= cut
        assert weight.abs().max() > 0.9 * cut


def fans(weight):
    field = weight[0, 0].numel()
    return weight.shape[1] * field, weight.shape[0] * field


@pytest.mark.parametrize("build", [EMNISTConvNet, EMNISTAutoencoder, lambda: TagClassifier(1000, 50)])
def test_dense_and_convolutional_layers_start_glorot_uniform_with_biases_of_zero(build):
    for name, parameter in build().named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0
        else:
            assert_uniform(parameter, math.sqrt(6 / sum(fans(parameter))))


def test_the_resnet_starts_he_normal_with_a_small_head():
    net = ResNet18(100)
    unit_cut = 0.87962566103423978  # deviation of a unit normal cut at +-2: numeric integral in the next test
    for name, parameter in net.named_parameters():
        if parameter.ndim == 4:
            std = math.sqrt(2 / fans(parameter)[0])
            assert_normal(parameter, std, cut=2 * std / unit_cut)
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
    assert_normal(net.head.weight, 0.01)


def test_the_deviation_of_a_cut_normal_is_its_integral():
    x = torch.linspace(-2, 2, 1_000_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    variance = torch.trapezoid(x.square() * density, x) / torch.trapezoid(density, x)
    assert variance.sqrt().item() == pytest.approx(0.87962566103423978, abs=1e-11)


@pytest.mark.parametrize("build", [CharacterLSTM, StackOverflowLSTM])
def test_lstms_start_as_in_the_original_code(build):
    net = build()
    assert_uniform(net.embedding.weight, 0.05)
    for layer in [net.lstm] if build is StackOverflowLSTM else net.lstms:
        hidden = layer.hidden_size
        kernel, recurrent, bias = keras_weights(layer)
        torch.testing.assert_close(recurrent @ recurrent.T, torch.eye(hidden), rtol=0, atol=1e-4)
        assert torch.equal(bias, torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(hidden))
        if build is CharacterLSTM:
            std = math.sqrt(2 / layer.input_size)
            assert_normal(kernel, std, cut=2 * std / 0.87962566103423978)
        else:
            assert_uniform(kernel, math.sqrt(6 / (layer.input_size + 4 * hidden)))
    heads = [net.head] if build is CharacterLSTM else [net.head, net.projection]
    for head in heads:
        assert_uniform(head.weight, math.sqrt(6 / sum(head.weight.shape)))
        assert head.bias.count_nonzero() == 0


# GroupNorm for BatchNorm


def batch_normed():
    shared = nn.BatchNorm2d(8, eps=1e-4)
    inner = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.BatchNorm1d(4 * 36))
    return jitter(nn.Sequential(nn.Conv2d(3, 8, 3), shared, nn.ReLU(), shared, inner))


def test_replacing_batch_norms_gives_the_network_built_with_group_norms():
    net = batch_normed()
    weights = dict(net.named_parameters())
    twin = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(4, 8, eps=1e-4),
        nn.ReLU(),
        nn.GroupNorm(4, 8, eps=1e-4),
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.GroupNorm(4, 4, affine=False), nn.Flatten(), nn.GroupNorm(4, 4 * 36)),
    )
    twin.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if name in twin.state_dict()})
    assert replace_batch_norm(net, num_groups=4) is net
    images = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(net(images), twin(images), rtol=0, atol=0)
    assert net[1] is net[3]
    after = dict(net.named_parameters())
    assert after.keys() == weights.keys()
    assert all(after[name] is weights[name] for name in weights)
    assert list(net.buffers()) == []


def test_a_replaced_norm_keeps_its_mode_and_what_is_frozen():
    norm = nn.BatchNorm1d(6).eval()
    norm.weight.requires_grad_(False)
    replaced = replace_batch_norm(norm, num_groups=3)
    assert isinstance(replaced, nn.GroupNorm)
    assert (replaced.num_groups, replaced.training, replaced.weight.requires_grad) == (3, False, False)
    assert replaced.weight is norm.weight


@pytest.mark.parametrize("norm", [nn.BatchNorm3d, nn.SyncBatchNorm])
def test_all_kinds_of_batch_norm_are_replaced(norm):
    net = replace_batch_norm(nn.ModuleDict({"norm": norm(4)}))
    assert type(net["norm"]) is nn.GroupNorm
    assert net["norm"].num_groups == 2


def test_a_network_without_batch_norms_stays_as_it_is():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.InstanceNorm1d(4))
    layers = list(net)
    assert list(replace_batch_norm(net)) == layers


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, images):
        return super().forward(images).relu()


@pytest.mark.parametrize(
    ("last", "num_groups", "error", "message"),
    [
        (nn.BatchNorm2d(9), 2, ValueError, "num_groups must divide the 9 channels of head.1, got 2"),
        (nn.BatchNorm2d(8), 0, ValueError, "num_groups must be 1 or more, got 0"),
        (ActivatedNorm(8), 2, TypeError, "head.1 is a ActivatedNorm, which may do more than a BatchNorm"),
        (nn.LazyBatchNorm2d(), 2, TypeError, "head.1 is a LazyBatchNorm2d"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_norms_that_cannot_be_replaced_are_named_and_none_is_changed(last, num_groups, error, message):
    net = nn.ModuleDict({"stem": nn.BatchNorm2d(8), "head": nn.Sequential(nn.ReLU(), last)})
    with pytest.raises(error, match=message):
        replace_batch_norm(net, num_groups)
    assert type(net["stem"]) is nn.BatchNorm2d


# Bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNet18(num_classes=0), "num_classes must be 1 or more, got 0"),
        (lambda: ResNet18(num_groups=3), "num_groups must divide 64, the smallest width, got 3"),
        (lambda: EMNISTConvNet(num_classes=-1), "num_classes must be 1 or more, got -1"),
        (lambda: EMNISTAutoencoder(hidden_dims=(5, 0)), "hidden_dims must be 1 or more, got 0"),
        (lambda: EMNISTAutoencoder(code_dim=0), "code_dim must be 1 or more, got 0"),
        (lambda: CharacterLSTM(num_layers=0), "num_layers must be 1 or more, got 0"),
        (lambda: StackOverflowLSTM(vocabulary_size=0), "vocabulary_size must be 1 or more, got 0"),
        (lambda: TagClassifier(vocabulary_size=0), "vocabulary_size must be 1 or more, got 0"),
        (lambda: DigitsConvNet(num_classes=0), "num_classes must be 1 or more, got 0"),
    ],
)
def test_sizes_that_make_no_network_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
