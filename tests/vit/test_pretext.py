import itertools
import math

import pytest
import torch
from torch import nn

from lightning_iclr.vit import VisionTransformer
from lightning_iclr.vit.pretext import MaskedPatchPrediction

TARGETS = ["mean_colour", "patch_4x4", "pixels"]


def encoder(**arguments):
    defaults = {"image_size": 16, "patch_size": 4, "num_classes": 0, "dim": 16, "depth": 1, "num_heads": 2}
    return VisionTransformer(**{**defaults, **arguments})


def within(share, probability, n, sigmas=4):
    return abs(share - probability) < sigmas * math.sqrt(probability * (1 - probability) / n)


@pytest.mark.parametrize(("patches", "count"), [(16, 8), (49, 24), (15, 7), (2, 1)])
def test_exactly_half_of_the_patches_rounded_down_are_corrupted(patches, count):
    draws = MaskedPatchPrediction(encoder()).draw(50, patches)
    assert draws.corrupted.shape == draws.replacement.shape == draws.source.shape == (50, count)
    assert all(len(set(row)) == count for row in draws.corrupted.tolist())
    assert draws.corrupted.min() >= 0
    assert draws.corrupted.max() < patches


def test_a_share_that_floats_cannot_hold_still_counts_exactly():
    assert MaskedPatchPrediction(encoder(), corruption=0.29).draw(1, 100).corrupted.shape == (1, 29)


def test_of_the_corrupted_patches_80_10_10_per_cent_are_masked_replaced_and_kept():
    draws = MaskedPatchPrediction(encoder()).draw(12_500, 16)
    kinds = draws.replacement.flatten()
    assert len(kinds) == 100_000
    for kind, probability in enumerate((0.8, 0.1, 0.1)):
        assert within((kinds == kind).double().mean(), probability, len(kinds))


def test_every_patch_is_corrupted_equally_often():
    draws = MaskedPatchPrediction(encoder()).draw(12_500, 16)
    shares = torch.bincount(draws.corrupted.flatten(), minlength=16) / 12_500
    assert all(within(share, 0.5, 12_500) for share in shares.tolist())


def test_another_patch_is_never_the_same_and_any_other_equally_often():
    draws = MaskedPatchPrediction(encoder()).draw(20_000, 5)
    pairs = torch.bincount((draws.corrupted * 5 + draws.source).flatten(), minlength=25).view(5, 5)
    assert pairs.diagonal().eq(0).all()
    for row in range(5):
        total = int(pairs[row].sum())
        assert all(within(pairs[row, other] / total, 0.25, total) for other in range(5) if other != row)


def test_draws_are_a_function_of_the_generator():
    pretext = MaskedPatchPrediction(encoder())
    first, again, other = (pretext.draw(4, 16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.corrupted, other.corrupted)


def test_two_ranks_draw_what_one_process_with_the_doubled_batch_draws():
    pretext = MaskedPatchPrediction(encoder())
    whole = pretext.draw(6, 16, torch.Generator().manual_seed(1))
    for rank in range(2):
        own = pretext.draw(3, 16, torch.Generator().manual_seed(1), place=(rank, 2))
        for mine, everyone in zip(own, whole, strict=True):
            assert torch.equal(mine, everyone[rank::2])


def test_two_ranks_losses_are_those_of_one_process():
    pretext = MaskedPatchPrediction(encoder(), target="pixels").double()
    nn.init.normal_(pretext.predictor.weight)
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    whole = pretext(images, torch.Generator().manual_seed(1))
    for rank in range(2):
        own = pretext(images[rank::2], torch.Generator().manual_seed(1), (rank, 2))
        torch.testing.assert_close(own.losses, whole.losses[rank::2], rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.loss, whole.losses.mean())


def test_corrupt_equals_a_loop_over_patches():
    pretext = MaskedPatchPrediction(encoder(), probabilities=(0.4, 0.3, 0.3)).double()
    tokens = torch.randn(5, 16, 16, dtype=torch.float64)
    draws = pretext.draw(5, 16)
    assert set(draws.replacement.flatten().tolist()) == {0, 1, 2}
    expected = tokens.clone()
    for image, place in itertools.product(range(5), range(8)):
        patch, source = int(draws.corrupted[image, place]), int(draws.source[image, place])
        kind = int(draws.replacement[image, place])
        options = {0: pretext.mask_token[0, 0].detach(), 1: tokens[image, source], 2: tokens[image, patch]}
        expected[image, patch] = options[kind]
    assert torch.equal(pretext.corrupt(tokens, draws), expected)


def test_the_mask_token_and_the_embedding_get_gradients():
    pretext = MaskedPatchPrediction(encoder())
    nn.init.normal_(pretext.predictor.weight)
    pretext(torch.rand(4, 3, 16, 16)).loss.backward()
    assert pretext.mask_token.grad.abs().sum() > 0
    assert pretext.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("colour", "bin_"), [(0.0, 0), (1.0, 7), (0.124, 0), (0.126, 1), (-0.1, 0), (1.1, 7)])
def test_colours_fall_into_eight_bins(colour, bin_):
    assert int(MaskedPatchPrediction(encoder()).classes(torch.tensor([0.0, 0.0, colour]))) == bin_


def test_white_is_class_511_and_pure_red_448():
    pretext = MaskedPatchPrediction(encoder())
    assert pretext.classes(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).tolist() == [511, 448]
    # As the network sees it, standardised.
    assert pretext.targets(torch.full((1, 3, 16, 16), 1.0)).unique().tolist() == [511]
    assert pretext.targets(torch.full((1, 3, 16, 16), -1.0)).unique().tolist() == [0]


@pytest.mark.parametrize(("bits", "channels"), [(3, 3), (1, 3), (8, 1), (2, 4)])
def test_every_class_has_a_colour_of_its_own(bits, channels):
    pretext = MaskedPatchPrediction(encoder(in_channels=channels), bits=bits)
    classes = torch.arange(2 ** (bits * channels))
    colours = pretext.colours(classes)
    assert colours.shape == (len(classes), channels)
    assert torch.equal(pretext.classes(colours), classes)


def slow_classes(pixels, bits=3):
    """Quantise a colour, a list of channels, by hand."""
    number = 0
    for value in pixels:
        number = number * 2**bits + min(int(value * 2**bits), 2**bits - 1)
    return number


def rectangular(target):
    net = encoder(image_size=(12, 14), patch_size=(6, 7))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    pretext = MaskedPatchPrediction(net, target=target, image_mean=mean, image_std=std).double()
    images = torch.rand(3, 3, 12, 14, dtype=torch.float64)
    shape = (1, 3, 1, 1)
    standardised = (images - torch.tensor(mean).double().view(shape)) / torch.tensor(std).double().view(shape)
    return pretext, images, standardised


def patch_of(images, image, patch):
    row, column = divmod(patch, 2)
    return images[image, :, 6 * row : 6 * row + 6, 7 * column : 7 * column + 7]


def test_mean_colours_equal_a_loop():
    pretext, images, standardised = rectangular("mean_colour")
    targets = pretext.targets(standardised)
    assert targets.shape == (3, 4)
    for image, patch in itertools.product(range(3), range(4)):
        colour = [float(channel.mean()) for channel in patch_of(images, image, patch)]
        assert int(targets[image, patch]) == slow_classes(colour)


def test_patches_scaled_down_to_4_by_4_equal_a_loop():
    pretext, images, standardised = rectangular("patch_4x4")
    targets = pretext.targets(standardised)
    assert targets.shape == (3, 4, 16)
    for image, patch, y, x in itertools.product(range(3), range(4), range(4), range(4)):
        rows = slice(math.floor(y * 6 / 4), math.ceil((y + 1) * 6 / 4))
        columns = slice(math.floor(x * 7 / 4), math.ceil((x + 1) * 7 / 4))
        colour = [float(channel[rows, columns].mean()) for channel in patch_of(images, image, patch)]
        assert int(targets[image, patch, 4 * y + x]) == slow_classes(colour)


def test_pixels_equal_a_loop():
    pretext, _, standardised = rectangular("pixels")
    targets = pretext.targets(standardised)
    for image, patch in itertools.product(range(3), range(4)):
        assert torch.equal(targets[image, patch], patch_of(standardised, image, patch).flatten())


@pytest.mark.parametrize("target", TARGETS)
def test_losses_equal_a_loop_over_corrupted_patches(target):
    pretext, _, standardised = rectangular(target)
    for parameter in pretext.parameters():
        nn.init.normal_(parameter, std=0.2)
    out = pretext(standardised, torch.Generator().manual_seed(4))
    tokens = pretext.corrupt(pretext.encoder.embed(standardised), pretext.draw(3, 4, torch.Generator().manual_seed(4)))
    encoded, targets = pretext.encoder.encode(tokens), pretext.targets(standardised)
    for image in range(3):
        losses = []
        for place in range(2):
            patch = int(out.corrupted[image, place])
            output = pretext.predictor(encoded[image, 1 + patch])
            wanted = targets[image, patch]
            assert torch.equal(out.targets[image, place], wanted)
            if target == "pixels":
                losses.append((output - wanted).square().mean().item())
            else:
                for logits, label in zip(output.view(-1, 512), wanted.view(-1), strict=True):
                    losses.append((logits.logsumexp(0) - logits[label]).item())
        assert out.losses[image].item() == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    assert out.loss.item() == pytest.approx(out.losses.mean().item(), abs=1e-12)


@pytest.mark.parametrize("target", ["mean_colour", "patch_4x4"])
def test_the_first_loss_is_that_of_a_blind_guess(target):
    out = MaskedPatchPrediction(encoder(), target=target)(torch.rand(4, 3, 16, 16))
    assert out.loss.item() == pytest.approx(math.log(512), abs=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_pasted_at_their_places_show_the_image(target):
    pretext, _, standardised = rectangular(target)
    every_patch = torch.arange(4).expand(3, 4)
    patches = pretext.as_patches(pretext.targets(standardised))
    assert patches.shape == (3, 4, 3, 6, 7)
    pasted = pretext.paste(torch.zeros(3, 3, 12, 14, dtype=torch.float64), patches, every_patch)
    _, images, _ = rectangular(target)
    if target == "pixels":
        expected = standardised * pretext.image_std + pretext.image_mean
        torch.testing.assert_close(pasted, expected, rtol=0, atol=1e-12)
    if target == "mean_colour":
        for image, patch in itertools.product(range(3), range(4)):
            own = patch_of(standardised * pretext.image_std + pretext.image_mean, image, patch).mean(dim=(1, 2))
            shown = patch_of(pasted, image, patch)
            assert torch.equal(shown, shown[:, :1, :1].expand_as(shown))
            assert (shown[:, 0, 0] - own).abs().max() <= 1 / 16  # half a bin
    if target == "patch_4x4":
        flat = pretext.classes(patch_of(pasted, 1, 2).flatten(1).T).view(6, 7)
        corners = pretext.targets(standardised)[1, 2].view(4, 4)[[0, 0, 3, 3], [0, 3, 0, 3]]
        assert flat[[0, 0, 5, 5], [0, 6, 0, 6]].tolist() == corners.tolist()
    assert images.shape == pasted.shape


def test_paste_leaves_the_other_patches_alone():
    pretext, images, _ = rectangular("pixels")
    corrupted = torch.tensor([[2], [0], [3]])
    pasted = pretext.paste(images, torch.full((3, 1, 3, 6, 7), 9.0), corrupted)
    for image, patch in itertools.product(range(3), range(4)):
        expected = patch_of(images, image, patch)
        expected = torch.full_like(expected, 9.0) if patch == corrupted[image] else expected
        assert torch.equal(patch_of(pasted, image, patch), expected)


class Adapter(nn.Module):
    """A foreign encoder: two class tokens and one linear layer."""

    dim, patch_size, in_channels, num_prefix_tokens = 6, (2, 4), 1, 2

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 6)
        self.prefix = nn.Parameter(torch.zeros(1, 2, 6))
        self.grids = []

    def embed(self, images):
        return self.proj(nn.functional.unfold(images, (2, 4), stride=(2, 4)).mT)

    def encode(self, tokens, grid=None):
        self.grids.append(grid)
        return torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1)


def test_a_foreign_encoder_takes_an_adapter_of_a_few_lines():
    pretext = MaskedPatchPrediction(Adapter(), probabilities=(0, 0, 1))
    nn.init.normal_(pretext.predictor.weight)
    images = torch.rand(3, 1, 8, 8)
    out = pretext(images)
    assert out.predictions.shape == (3, 4, 8)
    assert pretext.encoder.grids == [(4, 2)]
    expected = pretext.predictor(pretext.encoder.embed(images))
    for image, place in itertools.product(range(3), range(4)):
        torch.testing.assert_close(out.predictions[image, place], expected[image, out.corrupted[image, place]])


def test_represent_is_the_encoder_s():
    net, images = encoder(pool="mean"), torch.rand(2, 3, 16, 16)
    assert torch.equal(MaskedPatchPrediction(net).represent(images), net.represent(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corruption": 0.0}, r"corruption must be in \(0, 1\], got 0.0"),
        ({"corruption": 1.1}, r"corruption must be in \(0, 1\], got 1.1"),
        ({"probabilities": (0.8, 0.1, 0.2)}, "probabilities must be three chances that sum to 1"),
        ({"probabilities": (0.8, 0.2)}, "probabilities must be three chances that sum to 1"),
        ({"probabilities": (1.2, -0.1, -0.1)}, "probabilities must be three chances that sum to 1"),
        ({"bits": 0}, "bits must be between 1 and 8, got 0"),
        ({"bits": 9}, "bits must be between 1 and 8, got 9"),
        ({"target": "edges"}, "target must be one of 'mean_colour', 'patch_4x4', 'pixels', got 'edges'"),
        ({"image_std": 0.0}, "image_std must be positive, got 0.0"),
        ({"image_mean": (0.5, 0.5)}, "image_mean must be one number, or one for each of 3 channels"),
    ],
)
def test_bad_arguments_are_refused_in_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedPatchPrediction(encoder(), **arguments)


def test_small_patches_cannot_be_scaled_down_to_4_by_4():
    with pytest.raises(ValueError, match=r"needs patches of at least 4 x 4 pixels, got \(2, 2\)"):
        MaskedPatchPrediction(encoder(patch_size=2), target="patch_4x4")


def test_an_encoder_without_the_methods_is_refused():
    with pytest.raises(TypeError, match="encoder must have embed, encode, dim, patch_size.*; got Linear"):
        MaskedPatchPrediction(nn.Linear(3, 3))


def test_an_image_with_too_few_patches_is_refused():
    pretext = MaskedPatchPrediction(encoder(image_size=4))
    with pytest.raises(ValueError, match=r"corruption=0.5 corrupts 0 of 1 patches an image; use smaller patches"):
        pretext(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="corrupts 1 of 1 patches"):
        MaskedPatchPrediction(encoder(image_size=4), corruption=1.0)(torch.rand(1, 3, 4, 4))
