"""The networks of the paper's seven tasks (section 5), of the digits recipes, and a GroupNorm conversion for others.

Layers and initial weights are those of the code that the paper's experiments were run with (google-research/federated
as of autumn 2020); a year later that code replaced most of Keras's initialisers. All networks return logits, where
some of the original ones end in a softmax or a sigmoid. Shapes: B examples, C channels, (H, W) pixels, T tokens, V
tokens in the vocabulary, K classes.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TRUNCATED_STD = 0.87962566103423978  # deviation of a unit normal cut at +-2


class ResNet18(nn.Module):
    """Classify CIFAR's 24x24 crops: a pre-activation ResNet-18 with GroupNorm in place of BatchNorm.

    As in the original code only the stem reduces the image, by a 7x7 convolution and a max pool of stride 2 each; all
    four stages work at that resolution, where a usual ResNet halves it three more times. A shortcut that changes the
    width is a 1x1 convolution of the block's input, followed by a norm. Strided layers pad as TensorFlow's "SAME"
    does. Kernels start He-normal, the head normal with deviation 0.01. With 100 classes there are 11,227,812
    parameters, with 10 there are 11,181,642.

    The original adds 1e-4 times the squared norm of all kernels and of the head to the loss. This is the optimizer's
    ``weight_decay=2e-4``, which also decays the norms unless they get a parameter group of their own.

    Args:
        num_classes: Classes K.
        in_channels: Channels of the images.
        num_groups: Groups of every norm.

    Raises:
        ValueError: A number below 1, or ``num_groups`` does not divide 64, the smallest width.

    Examples:
        >>> ResNet18(num_classes=10)(torch.zeros(2, 3, 24, 24)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3, num_groups: int = 2) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes, in_channels=in_channels, num_groups=num_groups)
        if 64 % num_groups:
            raise ValueError(f"num_groups must divide 64, the smallest width, got {num_groups}")
        self.num_classes = num_classes
        self.stem = _conv(in_channels, 64, kernel_size=7, stride=2, padding=0)
        self.stem_norm = _group_norm(64, num_groups)
        blocks = []
        width = 64
        for stage, channels in enumerate((64, 128, 256, 512)):
            for block in range(2):
                blocks.append(_Block(width, channels, num_groups, preactivate=stage + block > 0))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = _group_norm(width, num_groups)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        features = F.relu(self.stem_norm(self.stem(_pad_same(images, kernel_size=7, stride=2))))
        # Padding with zeros is padding with minus infinity here: the ReLU left nothing below zero.
        features = F.max_pool2d(_pad_same(features, kernel_size=3, stride=2), kernel_size=3, stride=2)
        features = F.relu(self.norm(self.blocks(features)))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class EMNISTConvNet(nn.Module):
    """Recognise handwritten characters in 28x28 pixels (EMNIST CR): two 3x3 convolutions and two dense layers.

    Weights start Glorot-uniform and biases at 0. With 62 classes there are 1,206,590 parameters.

    Args:
        num_classes: Classes K.

    Raises:
        ValueError: ``num_classes`` is below 1.

    Examples:
        >>> EMNISTConvNet()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 62])
    """

    def __init__(self, num_classes: int = 62) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes)
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.dropout1 = nn.Dropout(0.25)
        self.hidden = nn.Linear(64 * 12 * 12, 128)
        self.dropout2 = nn.Dropout(0.5)
        self.head = nn.Linear(128, num_classes)
        _glorot_uniform(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 1, 28, 28) to logits (B, K)."""
        features = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(images)))), kernel_size=2)
        hidden = F.relu(self.hidden(self.dropout1(features).flatten(1)))
        logits: Tensor = self.head(self.dropout2(hidden))
        return logits


class EMNISTAutoencoder(nn.Module):
    """Compress an image to a short code and back (EMNIST AE): 784-1000-500-250-30 and mirrored.

    All layers end in a sigmoid but the code's, which is linear. Weights start Glorot-uniform and biases at 0. There
    are 2,837,314 parameters.

    Args:
        input_dim: Numbers in an image.
        hidden_dims: Widths from the image to the code.
        code_dim: Width of the code.

    Raises:
        ValueError: A width below 1.

    Examples:
        >>> EMNISTAutoencoder()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(self, input_dim: int = 784, hidden_dims: Sequence[int] = (1000, 500, 250), code_dim: int = 30) -> None:
        super().__init__()
        _check_positive(input_dim=input_dim, code_dim=code_dim)
        for width in hidden_dims:
            _check_positive(hidden_dims=width)
        widths = [input_dim, *hidden_dims, code_dim]
        down = [nn.Linear(wide, narrow) for wide, narrow in pairwise(widths)]
        up = [nn.Linear(narrow, wide) for narrow, wide in pairwise(reversed(widths))]
        self.encoder = nn.Sequential(*(layer for dense in down for layer in (dense, nn.Sigmoid())))[:-1]
        self.decoder = nn.Sequential(*(layer for dense in up for layer in (dense, nn.Sigmoid())))
        _glorot_uniform(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, ...) of values in [0, 1] to reconstructions of the same shape."""
        return self.decode(self.encode(images)).view_as(images)

    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, ...) to codes (B, D)."""
        codes: Tensor = self.encoder(images.flatten(1))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Map codes (B, D) to flat images (B, N)."""
        images: Tensor = self.decoder(codes)
        return images


class CharacterLSTM(nn.Module):
    """Predict the next character (Shakespeare): an embedding, LSTMs and a dense layer.

    LSTMs are Keras's, with one bias a gate where ``nn.LSTM`` has two; see `StackOverflowLSTM`. Their kernels start
    He-normal, the head Glorot-uniform. With the paper's vocabulary of 90 there are 820,522 parameters.

    The original masks tokens of 0. With the padding at the right this changes nothing that is counted, and is left
    out here.

    Args:
        vocabulary_size: Tokens V, special ones included: in the paper 86 characters, padding, out of vocabulary, begin
            and end.
        embedding_dim: Width of a token's embedding.
        hidden_dim: Width of an LSTM's state.
        num_layers: LSTMs.

    Raises:
        ValueError: A number below 1.

    Examples:
        >>> CharacterLSTM()(torch.zeros(2, 80, dtype=torch.long)).shape
        torch.Size([2, 80, 90])
    """

    def __init__(
        self, vocabulary_size: int = 90, embedding_dim: int = 8, hidden_dim: int = 256, num_layers: int = 2
    ) -> None:
        super().__init__()
        _check_positive(
            vocabulary_size=vocabulary_size, embedding_dim=embedding_dim, hidden_dim=hidden_dim, num_layers=num_layers
        )
        self.vocabulary_size = vocabulary_size
        self.embedding = _embedding(vocabulary_size, embedding_dim)
        widths = [embedding_dim] + [hidden_dim] * (num_layers - 1)
        self.lstms = nn.ModuleList(_LSTM(width, hidden_dim, kernel="he_normal") for width in widths)
        self.head = nn.Linear(hidden_dim, vocabulary_size)
        _glorot_uniform(self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V) of the tokens that follow them."""
        states = self.embedding(tokens)
        for lstm in self.lstms:
            states, _ = lstm(states)
        logits: Tensor = self.head(states)
        return logits


class StackOverflowLSTM(nn.Module):
    """Predict the next word (Stack Overflow NWP): an embedding, an LSTM, a projection and a dense layer.

    The paper's runs did not tie the embedding to the output: the original code offers it, off by default, and no
    published setting turns it on. So there are 4,050,748 parameters; tied, where the output has no bias, 3,080,360.

    ``nn.LSTM`` adds two biases to each gate and Keras one, so that plain SGD would move torch's sum twice as fast. One
    of the two is fixed at 0 here, as a buffer that no checkpoint holds, and counts as no parameter. The forget gate's
    bias starts at 1, recurrent weights orthogonal over all gates together, all other weights Glorot-uniform (the
    LSTM's with its four gates as one matrix), the embedding uniform within 0.05.

    Args:
        vocabulary_size: Tokens V, special ones included: in the paper 10,000 words, padding, out of vocabulary, begin
            and end.
        embedding_dim: Width of a token's embedding and of the projection.
        hidden_dim: Width of the LSTM's state.
        tied: Whether the output's weights are the embedding's.

    Raises:
        ValueError: A number below 1.

    Examples:
        >>> StackOverflowLSTM(vocabulary_size=104)(torch.zeros(2, 20, dtype=torch.long)).shape
        torch.Size([2, 20, 104])
    """

    def __init__(
        self, vocabulary_size: int = 10_004, embedding_dim: int = 96, hidden_dim: int = 670, tied: bool = False
    ) -> None:
        super().__init__()
        _check_positive(vocabulary_size=vocabulary_size, embedding_dim=embedding_dim, hidden_dim=hidden_dim)
        self.vocabulary_size = vocabulary_size
        self.embedding = _embedding(vocabulary_size, embedding_dim)
        self.lstm = _LSTM(embedding_dim, hidden_dim, kernel="glorot_uniform")
        self.projection = nn.Linear(hidden_dim, embedding_dim)
        _glorot_uniform(self.projection)
        self.head: nn.Linear | None = None
        if not tied:
            self.head = nn.Linear(embedding_dim, vocabulary_size)
            _glorot_uniform(self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V) of the tokens that follow them."""
        states, _ = self.lstm(self.embedding(tokens))
        projected: Tensor = self.projection(states)
        if self.head is None:
            return F.linear(projected, self.embedding.weight)
        logits: Tensor = self.head(projected)
        return logits


class TagClassifier(nn.Module):
    """Predict tags from a bag of words by logistic regression (Stack Overflow LR): one dense layer.

    Weights start Glorot-uniform and biases at 0. There are 5,000,500 parameters.

    Args:
        vocabulary_size: Words V.
        num_classes: Tags K.

    Raises:
        ValueError: A number below 1.

    Examples:
        >>> TagClassifier(vocabulary_size=100, num_classes=5)(torch.zeros(2, 100)).shape
        torch.Size([2, 5])
    """

    def __init__(self, vocabulary_size: int = 10_000, num_classes: int = 500) -> None:
        super().__init__()
        _check_positive(vocabulary_size=vocabulary_size, num_classes=num_classes)
        self.num_classes = num_classes
        self.head = nn.Linear(vocabulary_size, num_classes)
        _glorot_uniform(self)

    def forward(self, words: Tensor) -> Tensor:
        """Map the words' shares of a text (B, V) to logits (B, K)."""
        logits: Tensor = self.head(words)
        return logits


class DigitsConvNet(nn.Module):
    """Recognise the embedded 8x8 digits with 4,538 parameters: one 3x3 convolution and two dense layers.

    It is not one of the paper's networks and starts from torch's initial weights.

    Args:
        num_classes: Classes K.

    Raises:
        ValueError: ``num_classes`` is below 1.

    Examples:
        >>> DigitsConvNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes)
        self.num_classes = num_classes
        self.conv = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.hidden = nn.Linear(8 * 4 * 4, 32)
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 1, 8, 8) to logits (B, K)."""
        features = F.max_pool2d(F.relu(self.conv(images)), kernel_size=2)
        logits: Tensor = self.head(F.relu(self.hidden(features.flatten(1))))
        return logits


def replace_batch_norm(net: nn.Module, num_groups: int = 2) -> nn.Module:
    """Replace every BatchNorm of a network by a GroupNorm with the same scale, shift and epsilon.

    Clients with few or unlike examples have no common batch statistics; GroupNorm needs none (Hsieh et al. 2020). The
    network is changed in place, its parameters stay the same objects, and the running statistics are dropped, so a
    trained network needs some more training.

    Args:
        net: Any network.
        num_groups: Groups of every norm; must divide the channels of all of them.

    Returns:
        ``net``, or the new norm if ``net`` is itself a BatchNorm.

    Raises:
        TypeError: A norm of a class derived from BatchNorm, which may do more than normalise.
        ValueError: ``num_groups`` is below 1 or does not divide a norm's channels.

    Examples:
        >>> type(replace_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))[1]).__name__
        'GroupNorm'
    """
    _check_positive(num_groups=num_groups)
    # All norms are checked before the first is replaced. One that stands at two places stays one.
    replacements: dict[nn.Module, nn.Module] = {}
    paths = [(path, m) for path, m in net.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)]
    for path, norm in paths:
        place = path or "net"
        if type(norm) not in _BATCH_NORMS:
            raise TypeError(
                f"{place} is a {type(norm).__name__}, which may do more than a BatchNorm; build the network with a "
                f"plain BatchNorm or with GroupNorm there"
            )
        if norm.num_features % num_groups:
            raise ValueError(f"num_groups must divide the {norm.num_features} channels of {place}, got {num_groups}")
        group_norm = nn.GroupNorm(num_groups, norm.num_features, norm.eps, norm.affine)
        group_norm.weight, group_norm.bias = norm.weight, norm.bias
        replacements[norm] = group_norm.train(norm.training)
    for path, norm in paths:
        if path:
            net.set_submodule(path, replacements[norm])
    return replacements.get(net, net)


class _Block(nn.Module):
    """Add two norm-ReLU-convolution branches to the input (He et al. 2016, "Identity Mappings", figure 1b).

    Without ``preactivate`` the first norm and ReLU are left out: the stem ends in them.
    """

    def __init__(self, in_channels: int, channels: int, num_groups: int, preactivate: bool) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_channels, num_groups) if preactivate else None
        self.conv1 = _conv(in_channels, channels, kernel_size=3, padding=1)
        self.norm2 = _group_norm(channels, num_groups)
        self.conv2 = _conv(channels, channels, kernel_size=3, padding=1)
        self.shortcut: nn.Sequential | None = None
        if in_channels != channels:
            self.shortcut = nn.Sequential(_conv(in_channels, channels), _group_norm(channels, num_groups))

    def forward(self, images: Tensor) -> Tensor:
        branch: Tensor = images if self.norm1 is None else F.relu(self.norm1(images))
        branch = self.conv2(F.relu(self.norm2(self.conv1(branch))))
        shortcut: Tensor = images if self.shortcut is None else self.shortcut(images)
        return shortcut + branch


class _LSTM(nn.LSTM):
    """An LSTM with Keras's one bias a gate and Keras's initial weights; torch's gates have Keras's order."""

    def __init__(self, input_dim: int, hidden_dim: int, kernel: Literal["he_normal", "glorot_uniform"]) -> None:
        super().__init__(input_dim, hidden_dim, batch_first=True)
        # What nn.LSTM calls wants a second bias. Setting the attribute tells it of the new tensor.
        delattr(self, "bias_hh_l0")
        self.register_buffer("bias_hh_l0", None, persistent=False)
        self.bias_hh_l0 = torch.zeros(4 * hidden_dim)
        if kernel == "he_normal":
            _he_normal(self.get_parameter("weight_ih_l0"))
        else:
            nn.init.xavier_uniform_(self.get_parameter("weight_ih_l0"))
        nn.init.orthogonal_(self.get_parameter("weight_hh_l0"))
        with torch.no_grad():
            gates = self.get_parameter("bias_ih_l0").zero_().view(4, hidden_dim)
            gates[1] = 1.0  # input, forget, cell, output


def _conv(in_channels: int, channels: int, kernel_size: int = 1, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding, bias=False)
    _he_normal(conv.weight)
    return conv


def _group_norm(channels: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=1e-3)


def _embedding(vocabulary_size: int, embedding_dim: int) -> nn.Embedding:
    embedding = nn.Embedding(vocabulary_size, embedding_dim)
    nn.init.uniform_(embedding.weight, -0.05, 0.05)
    return embedding


def _he_normal(weight: Tensor) -> None:
    """Draw from Keras's ``he_normal``: a normal cut at two deviations, then of variance 2 / fan-in."""
    std = (2.0 / weight[0].numel()) ** 0.5 / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _glorot_uniform(net: nn.Module) -> None:
    """Draw all dense and convolutional weights from Keras's default, and set their biases to 0."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _pad_same(images: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Pad (B, C, H, W) with zeros to ceil(H / stride) windows; the odd row and column go to the bottom and right."""
    pads: list[int] = []
    for size in reversed(images.shape[-2:]):
        missing = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(images, pads)


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
