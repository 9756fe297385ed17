"""Masked patch prediction: pre-training without labels (appendix B.1.2).

Shapes: B images, N patches in a grid (h, w), D width, M = floor(corruption * N) corrupted patches an image, C channels.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Target = Literal["mean_colour", "patch_4x4", "pixels"]
SIDE = 4  # rows and columns of a patch in the target patch_4x4


class PatchEncoder(Protocol):
    """What is needed of an encoder; `VisionTransformer` is one, others take an adapter of a few lines."""

    dim: int
    patch_size: tuple[int, int]
    in_channels: int
    num_prefix_tokens: int

    def embed(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to patch embeddings (B, N, D), before positions."""

    def encode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map patch embeddings (B, N, D) of a grid (h, w) to outputs (B, num_prefix_tokens + N, D)."""


class PretextOutput(NamedTuple):
    """What masked patch prediction returns.

    Attributes:
        loss: Mean over all corrupted patches, a scalar.
        losses: The same for each image (B,).
        predictions: Without gradient, logits (B, M, K) of ``mean_colour``, (B, M, 16, K) of ``patch_4x4``, or values
            (B, M, C ph pw) of ``pixels``.
        targets: Classes (B, M) or (B, M, 16), or values (B, M, C ph pw).
        corrupted: Which patches they belong to (B, M), counted row by row.
        replacement: What each became (B, M): 0 the mask token, 1 another patch, 2 itself.
    """

    loss: Tensor
    losses: Tensor
    predictions: Tensor
    targets: Tensor
    corrupted: Tensor
    replacement: Tensor


class Corruption(NamedTuple):
    """Draws for one batch.

    Attributes:
        corrupted: Patches to corrupt (B, M), in no order.
        replacement: 0 for the mask token, 1 for another patch, 2 to keep it (B, M).
        source: The other patch (B, M), never the corrupted one itself.
    """

    corrupted: Tensor
    replacement: Tensor
    source: Tensor


class MaskedPatchPrediction(nn.Module):
    """Corrupt patch embeddings and predict, for each corrupted patch, its content from its own output (B.1.2).

    Of each image's N patches floor(corruption * N) are corrupted: their embeddings, before positions are added, become
    a learned mask token, the embedding of another patch of the same image, or stay. The paper does not say which
    image the other patch is from, nor that it is another one.

    Args:
        encoder: Network with the methods of `PatchEncoder`.
        corruption: Share of patches to corrupt, in (0, 1].
        probabilities: Chances of a corrupted patch to become the mask token, another patch, or to stay; they sum to 1.
        bits: Bits a colour channel is quantised to, 1 to 8: with 3 bits RGB has 512 classes.
        target: ``mean_colour`` of the patch, as classes; the colours of the patch scaled down to 4 x 4 pixels, as 16
            classes; or its ``pixels`` by their squared error.
        image_mean: What the images had subtracted, one number or one a channel; colours are quantised in [0, 1].
        image_std: What the images were divided by, after that.

    Raises:
        ValueError: A number outside its range, an unknown target, or patches below 4 pixels for ``patch_4x4``.
        TypeError: An encoder without ``embed`` and ``encode``.

    Examples:
        >>> from lightning_iclr.vit import VisionTransformer
        >>> encoder = VisionTransformer(image_size=8, patch_size=2, num_classes=0, dim=16, depth=1, num_heads=2)
        >>> out = MaskedPatchPrediction(encoder)(torch.rand(5, 3, 8, 8))
        >>> out.predictions.shape, out.targets.shape
        (torch.Size([5, 8, 512]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        corruption: float = 0.5,
        probabilities: Sequence[float] = (0.8, 0.1, 0.1),
        bits: int = 3,
        target: Target = "mean_colour",
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
    ) -> None:
        super().__init__()
        missing = [name for name in ("embed", "encode", *PatchEncoder.__annotations__) if not hasattr(encoder, name)]
        if missing:
            raise TypeError(f"encoder must have {', '.join(missing)}; got {type(encoder).__name__}")
        if not 0.0 < corruption <= 1.0:
            raise ValueError(f"corruption must be in (0, 1], got {corruption}")
        if len(probabilities) != 3 or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6:
            raise ValueError(f"probabilities must be three chances that sum to 1, got {tuple(probabilities)}")
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must be between 1 and 8, got {bits}")
        if target not in get_args(Target):
            raise ValueError(f"target must be one of {', '.join(map(repr, get_args(Target)))}, got {target!r}")
        patch: tuple[int, int] = encoder.patch_size  # type: ignore[assignment]
        channels: int = encoder.in_channels  # type: ignore[assignment]
        dim: int = encoder.dim  # type: ignore[assignment]
        if target == "patch_4x4" and min(patch) < SIDE:
            raise ValueError(f"target 'patch_4x4' needs patches of at least 4 x 4 pixels, got {patch}")
        self.encoder = encoder
        self.corruption, self.probabilities = corruption, tuple(probabilities)
        self.bits, self.target = bits, target
        self.patch_size, self.in_channels = patch, channels
        self.num_colours = 2 ** (bits * channels)
        outputs = {
            "mean_colour": self.num_colours,
            "patch_4x4": SIDE**2 * self.num_colours,
            "pixels": channels * patch[0] * patch[1],
        }
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.predictor = nn.Linear(dim, outputs[target])
        self.register_buffer("image_mean", _per_channel("image_mean", image_mean, channels), persistent=False)
        self.register_buffer("image_std", _per_channel("image_std", image_std, channels), persistent=False)
        self.image_mean: Tensor
        self.image_std: Tensor
        if not bool((self.image_std > 0).all()):
            raise ValueError(f"image_std must be positive, got {image_std}")
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.zeros_(self.predictor.weight)
        nn.init.zeros_(self.predictor.bias)

    def forward(
        self, images: Tensor, generator: torch.Generator | None = None, place: tuple[int, int] = (0, 1)
    ) -> PretextOutput:
        """Corrupt, encode and predict.

        Args:
            images: Images (B, C, H, W), standardised by ``image_mean`` and ``image_std``.
            generator: Source of the draws; ``None`` for torch's own.
            place: Rank and world size W. Images are taken to be every W-th of a global batch, as `EpochSampler` deals
                them, and the draws are those of the global batch: so W processes corrupt what one would.

        Raises:
            ValueError: An image with too few patches to corrupt one.
        """
        grid = (images.shape[-2] // self.patch_size[0], images.shape[-1] // self.patch_size[1])
        draws = self.draw(
            len(images), grid[0] * grid[1], generator, place
        )  # first: torch.compile breaks its graph here
        draws = Corruption(*(draw.to(images.device, non_blocking=True) for draw in draws))
        tokens = self.encoder.embed(images)  # type: ignore[operator]
        encoded = self.encoder.encode(self.corrupt(tokens, draws), grid)  # type: ignore[operator]
        encoded = encoded[:, self.encoder.num_prefix_tokens :]
        predictions = self.predictor(_take(encoded, draws.corrupted))
        targets = self.targets(images)
        targets = targets.gather(1, draws.corrupted) if targets.ndim == 2 else _take(targets, draws.corrupted)
        if self.target == "pixels":
            losses = F.mse_loss(predictions, targets.to(predictions.dtype), reduction="none").flatten(1).mean(dim=1)
        else:
            if self.target == "patch_4x4":
                predictions = predictions.unflatten(-1, (SIDE**2, self.num_colours))
            losses = F.cross_entropy(predictions.flatten(0, -2), targets.flatten(), reduction="none")
            losses = losses.view(len(images), -1).mean(dim=1)
        # Detached: what a sharded network returns with a gradient must be no view, as a linear layer's output is.
        predictions = predictions.detach()
        return PretextOutput(losses.mean(), losses, predictions, targets, draws.corrupted, draws.replacement)

    def represent(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the encoder's representation (B, D)."""
        features: Tensor = self.encoder.represent(images)  # type: ignore[operator]
        return features

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def draw(
        self, batch: int, patches: int, generator: torch.Generator | None = None, place: tuple[int, int] = (0, 1)
    ) -> Corruption:
        """Draw which patches become what, for a batch of images; see `forward`.

        Raises:
            ValueError: Too few patches to corrupt one, or to take another's embedding.
        """
        count = int(self.corruption * patches + 1e-9)
        if count < 1 or (patches < 2 and self.probabilities[1] > 0):
            raise ValueError(
                f"corruption={self.corruption} corrupts {count} of {patches} patches an image; use smaller patches"
            )
        rank, world_size = place
        device = torch.device("cpu") if generator is None else generator.device
        shape = (batch * world_size, patches)
        order, kind, other = (torch.rand(shape, generator=generator, device=device)[rank::world_size] for _ in range(3))
        corrupted = order.argsort(dim=1)[:, :count]
        masked, replaced = self.probabilities[0], self.probabilities[0] + self.probabilities[1]
        kind = kind[:, :count]
        replacement = (kind >= masked).long() + (kind >= replaced).long()
        step = 1 + (other[:, :count] * (patches - 1)).long().clamp_(max=max(patches - 2, 0))
        return Corruption(corrupted, replacement, (corrupted + step) % patches)

    def corrupt(self, tokens: Tensor, draws: Corruption) -> Tensor:
        """Return patch embeddings (B, N, D) with the drawn ones replaced."""
        kept, others = _take(tokens, draws.corrupted), _take(tokens, draws.source)
        kind = draws.replacement.unsqueeze(-1)
        replaced = torch.where(kind == 0, self.mask_token.to(tokens.dtype), torch.where(kind == 1, others, kept))
        return tokens.scatter(1, draws.corrupted.unsqueeze(-1).expand_as(replaced), replaced)

    def targets(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to what is predicted of each patch: (B, N), (B, N, 16) or (B, N, C ph pw).

        Pixels are predicted as they are given, standardised.
        """
        height, width = self.patch_size
        patches = images.unfold(2, height, height).unfold(3, width, width)  # B, C, h, w, ph, pw
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # B, N, C, ph, pw
        if self.target == "pixels":
            return patches.flatten(2)
        colours = patches * self.image_std.to(images) + self.image_mean.to(images)
        if self.target == "mean_colour":
            return self.classes(colours.mean(dim=(-2, -1)))
        small = F.adaptive_avg_pool2d(colours.flatten(0, 1), SIDE).view(*colours.shape[:3], SIDE**2)
        return self.classes(small.transpose(2, 3))

    def classes(self, colours: Tensor) -> Tensor:
        """Map colours (..., C) in [0, 1] to classes (...): each channel's bin, the last channel in the lowest bits."""
        bins = (colours * 2**self.bits).long().clamp_(0, 2**self.bits - 1)
        place = torch.arange(self.in_channels - 1, -1, -1, device=colours.device)
        classes: Tensor = (bins << (self.bits * place)).sum(dim=-1)
        return classes

    def colours(self, classes: Tensor) -> Tensor:
        """Map classes (...) to the colours (..., C) in the middle of their bins, in [0, 1]."""
        place = torch.arange(self.in_channels - 1, -1, -1, device=classes.device)
        bins: Tensor = (classes.unsqueeze(-1) >> (self.bits * place)) & (2**self.bits - 1)
        centres: Tensor = (bins + 0.5) / 2**self.bits
        return centres

    def as_patches(self, values: Tensor) -> Tensor:
        """Map classes (B, M) or (B, M, 16), or values (B, M, C ph pw), to patches (B, M, C, ph, pw) in [0, 1]."""
        channels, (height, width) = self.in_channels, self.patch_size
        if self.target == "pixels":
            patches = values.view(*values.shape[:2], channels, height, width)
            return patches * self.image_std.to(values) + self.image_mean.to(values)
        side = 1 if self.target == "mean_colour" else SIDE
        small = self.colours(values).reshape(-1, side, side, channels).movedim(-1, 1)
        return F.interpolate(small, size=self.patch_size).view(*values.shape[:2], channels, height, width)

    def paste(self, images: Tensor, patches: Tensor, corrupted: Tensor) -> Tensor:
        """Put patches (B, M, C, ph, pw) into images (B, C, H, W) at their places (B, M)."""
        (height, width), (rows, columns) = self.patch_size, images.shape[-2:]
        cut = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)  # B, N, C ph pw
        cut = cut.scatter(1, corrupted.unsqueeze(-1).expand(-1, -1, cut.shape[2]), patches.flatten(2).to(cut))
        return F.fold(cut.transpose(1, 2), (rows, columns), (height, width), stride=(height, width))


def _take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens (B, M, D) of (B, N, D) at indices (B, M)."""
    index = indices.view(*indices.shape, *(1,) * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
    return tokens.gather(1, index)


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:
    values = torch.tensor([value] * channels if isinstance(value, (int, float)) else list(value))
    if len(values) != channels:
        raise ValueError(f"{name} must be one number, or one for each of {channels} channels; got {value}")
    return values.view(channels, 1, 1)
