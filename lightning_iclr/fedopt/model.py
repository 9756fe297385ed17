"""The networks of the paper's seven tasks (section 5) and of the digits recipes.

Layers and initial weights are those of the code that the paper's experiments were run with (google-research/federated
as of autumn 2020); a year later that code replaced most of Keras's initialisers. All networks return logits, where
some of the original ones end in a softmax or a sigmoid. Shapes: B examples, C channels, (H, W) pixels, T tokens, V
tokens in the vocabulary, K classes.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_iclr.fedopt.keras_layers import KerasLSTM, conv2d, embedding, glorot_uniform, group_norm, pad_same


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
        >>> import torch
        >>> ResNet18(num_classes=10)(torch.zeros(2, 3, 24, 24)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3, num_groups: int = 2) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes, in_channels=in_channels, num_groups=num_groups)
        if 64 % num_groups:
            raise ValueError(f"num_groups must divide 64, the smallest width, got {num_groups}")
        self.num_classes = num_classes
        self.stem = conv2d(in_channels, 64, kernel_size=7, stride=2, padding=0)
        self.stem_norm = group_norm(64, num_groups)
        blocks = []
        width = 64
        for stage, channels in enumerate((64, 128, 256, 512)):
            for block in range(2):
                blocks.append(_Block(width, channels, num_groups, preactivate=stage + block > 0))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = group_norm(width, num_groups)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        features = F.relu(self.stem_norm(self.stem(pad_same(images, kernel_size=7, stride=2))))
        # Padding with zeros is padding with minus infinity here: the ReLU left nothing below zero.
        features = F.max_pool2d(pad_same(features, kernel_size=3, stride=2), kernel_size=3, stride=2)
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
        >>> import torch
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
        glorot_uniform(self)

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
        >>> import torch
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
        glorot_uniform(self)

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
        >>> import torch
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
        self.embedding = embedding(vocabulary_size, embedding_dim)
        widths = [embedding_dim] + [hidden_dim] * (num_layers - 1)
        self.lstms = nn.ModuleList(KerasLSTM(width, hidden_dim, kernel="he_normal") for width in widths)
        self.head = nn.Linear(hidden_dim, vocabulary_size)
        glorot_uniform(self.head)

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
        >>> import torch
        >>> StackOverflowLSTM(vocabulary_size=104)(torch.zeros(2, 20, dtype=torch.long)).shape
        torch.Size([2, 20, 104])
    """

    def __init__(
        self, vocabulary_size: int = 10_004, embedding_dim: int = 96, hidden_dim: int = 670, tied: bool = False
    ) -> None:
        super().__init__()
        _check_positive(vocabulary_size=vocabulary_size, embedding_dim=embedding_dim, hidden_dim=hidden_dim)
        self.vocabulary_size = vocabulary_size
        self.embedding = embedding(vocabulary_size, embedding_dim)
        self.lstm = KerasLSTM(embedding_dim, hidden_dim, kernel="glorot_uniform")
        self.projection = nn.Linear(hidden_dim, embedding_dim)
        glorot_uniform(self.projection)
        self.head: nn.Linear | None = None
        if not tied:
            self.head = nn.Linear(embedding_dim, vocabulary_size)
            glorot_uniform(self.head)

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
        >>> import torch
        >>> TagClassifier(vocabulary_size=100, num_classes=5)(torch.zeros(2, 100)).shape
        torch.Size([2, 5])
    """

    def __init__(self, vocabulary_size: int = 10_000, num_classes: int = 500) -> None:
        super().__init__()
        _check_positive(vocabulary_size=vocabulary_size, num_classes=num_classes)
        self.num_classes = num_classes
        self.head = nn.Linear(vocabulary_size, num_classes)
        glorot_uniform(self)

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
        >>> import torch
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


class _Block(nn.Module):
    """Add two norm-ReLU-convolution branches to the input (He et al. 2016, "Identity Mappings", figure 1b).

    Without ``preactivate`` the first norm and ReLU are left out: the stem ends in them.
    """

    def __init__(self, in_channels: int, channels: int, num_groups: int, preactivate: bool) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, num_groups) if preactivate else None
        self.conv1 = conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(channels, num_groups)
        self.conv2 = conv2d(channels, channels, kernel_size=3, padding=1)
        self.shortcut: nn.Sequential | None = None
        if in_channels != channels:
            self.shortcut = nn.Sequential(conv2d(in_channels, channels), group_norm(channels, num_groups))

    def forward(self, images: Tensor) -> Tensor:
        branch: Tensor = images if self.norm1 is None else F.relu(self.norm1(images))
        branch = self.conv2(F.relu(self.norm2(self.conv1(branch))))
        shortcut: Tensor = images if self.shortcut is None else self.shortcut(images)
        return shortcut + branch


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
