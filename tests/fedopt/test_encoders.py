"""Columns become the tensors of the original code: against loops over characters, words and pixels."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from lightning_iclr.embedded import load_shakespeare
from lightning_iclr.fedopt.encoders import ImageEncoder
from lightning_iclr.fedopt.text_encoders import SHAKESPEARE_CHARACTERS, CharacterEncoder, TagEncoder, WordEncoder
from lightning_iclr.sampling import sample_generator


def pixels(n, height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def images(encode, arrays, generators=None):
    return encode.serve(encode({"image": list(arrays), "label": [0] * len(arrays)}), generators)[0]


def generators(n, seed=0, epoch=0):
    return [sample_generator(seed, epoch, index) for index in range(n)]


def test_pixels_are_scaled_to_the_unit_interval_and_standardised_by_channel():
    arrays = pixels(4, 5, 6)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (arrays.transpose(0, 3, 1, 2) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    served = images(ImageEncoder(mean=mean, std=std), arrays)
    assert served.dtype == torch.float32
    np.testing.assert_allclose(served.numpy(), expected, atol=1e-6)


def test_per_image_standardisation_is_that_of_tensorflow_after_the_crop():
    arrays = pixels(3, 32, 32).astype(np.float64)
    arrays[1] = 7.0  # no deviation at all
    arrays[2] = 7.0
    arrays[2, 16, 16] = 8.0  # less than 1 / sqrt(24 * 24 * 3) grey values
    served = images(ImageEncoder(standardize=True, crop=24), arrays.astype(np.uint8))
    for image, array in zip(served, arrays, strict=True):
        view = array[4:28, 4:28]
        expected = (view - view.mean()) / max(view.std(), 1 / math.sqrt(view.size))
        np.testing.assert_allclose(image.numpy(), expected.transpose(2, 0, 1), atol=1e-4)
    assert served[1].abs().max() == 0


def test_the_least_deviation_is_counted_in_grey_values_whatever_the_largest_pixel():
    array = np.full((1, 4, 4), 3.0, np.float32)
    array[0, 0, 0] = 3.02
    for white in (255.0, 16.0):
        grey = array[0].astype(np.float64) * 255 / white
        expected = (grey - grey.mean()) / max(grey.std(), 1 / math.sqrt(16))
        served = images(ImageEncoder(standardize=True, white=white), array)
        np.testing.assert_allclose(served[0, 0].numpy(), expected, atol=1e-5)


def test_inverting_shows_one_minus_the_pixel():
    arrays = pixels(2, 4, 4, 1)
    plain = images(ImageEncoder(), arrays)
    torch.testing.assert_close(images(ImageEncoder(invert=True), arrays), 1 - plain)
    standardised = images(ImageEncoder(standardize=True), arrays)
    torch.testing.assert_close(images(ImageEncoder(standardize=True, invert=True), arrays), -standardised)


@pytest.mark.parametrize(("side", "crop", "first"), [(32, 24, 4), (7, 4, 1), (5, 5, 0)])
def test_evaluation_cuts_out_the_centre(side, crop, first):
    arrays = pixels(2, side, side + 2)
    cut = arrays[:, first : first + crop, first + 1 : first + 1 + crop]
    torch.testing.assert_close(images(ImageEncoder(crop=crop), arrays), images(ImageEncoder(), cut))


def test_a_training_image_is_a_window_mirrored_or_not_of_its_image():
    arrays = pixels(12, 9, 8)
    whole = images(ImageEncoder(), arrays)
    served = images(ImageEncoder(crop=6, flip=True), arrays, generators(12))
    seen = set()
    for image, view in zip(whole, served, strict=True):
        matches = [
            (top, left, mirrored)
            for top in range(4)
            for left in range(3)
            for mirrored in (False, True)
            if torch.equal(view.flip(-1) if mirrored else view, image[:, top : top + 6, left : left + 6])
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 6


def test_windows_are_uniform_and_half_of_the_images_are_mirrored():
    # A pixel's value tells its place: the served corner is the window's, its neighbour whether it is mirrored.
    array = np.arange(16, dtype=np.float32).reshape(4, 4)
    n = 1800
    served = images(ImageEncoder(white=1.0, crop=2, flip=True), np.repeat(array[None], n, axis=0), generators(n))
    mirrored = served[:, 0, 0, 0] > served[:, 0, 0, 1]
    assert abs(int(mirrored.sum()) - n / 2) < 4 * math.sqrt(n / 4)
    corners = served.amin(dim=(1, 2, 3)).long()
    counts = corners.bincount(minlength=16).reshape(4, 4)[:3, :3]
    assert int(counts.sum()) == n
    # Chi-squared of 8 degrees of freedom: mean 8, standard deviation 4.
    assert float(((counts - n / 9) ** 2 / (n / 9)).sum()) < 8 + 5 * 4


def test_what_a_generator_draws_does_not_depend_on_the_rest_of_the_batch():
    arrays = pixels(6, 10, 10)
    encode = ImageEncoder(crop=5, flip=True)
    together = images(encode, arrays, generators(6))
    alone = torch.cat([images(encode, arrays[i : i + 1], generators(6)[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)


def test_pictures_of_all_modes_are_converted_to_the_channels_asked_for():
    colour = Image.fromarray(pixels(1, 4, 4)[0])
    modes = [colour.convert(mode) for mode in ("RGB", "RGBA", "P", "L", "1")]
    encode = ImageEncoder(in_channels=1)
    served = images(encode, modes)
    for image, picture in zip(served, modes, strict=True):
        np.testing.assert_allclose(image[0].numpy(), np.asarray(picture.convert("L")) / 255, atol=1e-6)
    assert images(ImageEncoder(in_channels=3), modes).shape == (5, 3, 4, 4)
    assert images(ImageEncoder(), [colour.convert("L")]).shape == (1, 1, 4, 4)


def test_pictures_are_resized_before_anything_else():
    pictures = [Image.fromarray(array) for array in (*pixels(1, 8, 8), *pixels(1, 6, 4))]
    served = images(ImageEncoder(image_size=4), pictures)
    expected = [np.asarray(picture.resize((4, 4), Image.Resampling.BILINEAR)) / 255 for picture in pictures]
    np.testing.assert_allclose(served.numpy(), np.transpose(expected, (0, 3, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("kind", [list, np.asarray, lambda rows: np.asarray(rows, dtype=np.int64)])
def test_lists_and_arrays_of_integers_are_images(kind):
    served = images(ImageEncoder(white=16.0), [kind([[0, 8], [16, 4]])])
    assert served.tolist() == [[[[0.0, 0.5], [1.0, 0.25]]]]


def test_arrays_with_channels_first_are_images():
    array = pixels(1, 5, 6)[0]
    torch.testing.assert_close(images(ImageEncoder(), [array.transpose(2, 0, 1)]), images(ImageEncoder(), [array]))


def test_images_without_a_label_column_are_of_class_0():
    encode = ImageEncoder(label_column=None)
    assert encode.columns == {"image_column": "image"}
    assert encode({"image": list(pixels(3, 2, 2))})[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "columns", "message"),
    [
        ({}, {"image": [pixels(1, 2, 2)[0], pixels(1, 2, 3)[0]], "label": [0, 0]}, "one shape.*set image_size"),
        ({}, {"image": [np.zeros(3)], "label": [0]}, "image_column='image' must hold images, got an array of"),
        ({}, {"image": pixels(2, 2, 2), "label": ["a", "b"]}, "label_column='label' must hold classes from 0, got 'a'"),
        ({}, {"image": pixels(1, 2, 2), "label": [-1]}, "must hold classes from 0, got -1"),
        ({"crop": 3}, {"image": pixels(1, 2, 4), "label": [0]}, r"crop must fit into images of \(2, 4\) pixels, got 3"),
        ({"image_size": 4}, {"image": pixels(1, 2, 2), "label": [0]}, "need pictures in image_column='image', got nd"),
    ],
)
def test_an_image_column_of_another_kind_is_refused_by_name(arguments, columns, message):
    with pytest.raises(ValueError, match=message):
        ImageEncoder(**arguments)(columns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 0}, "crop must be at least 1, got 0"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"in_channels": 2}, "in_channels must be 1, 3 or None, got 2"),
        ({"std": (1.0, 0.0, 1.0)}, r"std must be positive, got \(1.0, 0.0, 1.0\)"),
        ({"white": 0.0}, "white must be positive, got 0.0"),
    ],
)
def test_a_number_outside_its_range_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageEncoder(**arguments)


def test_the_benchmark_has_86_characters_and_so_90_signs_and_the_plays_use_75():
    assert len(SHAKESPEARE_CHARACTERS) == len(set(SHAKESPEARE_CHARACTERS)) == 86
    assert CharacterEncoder().num_tokens == 90
    used = set("".join(load_shakespeare()["text"]))
    assert len(used) == 75
    assert used < set(SHAKESPEARE_CHARACTERS)


def character_windows(texts, length, vocabulary):
    """One text after the other, sign by sign."""
    windows, rows = [], []
    for row, text in enumerate(texts):
        signs = [len(vocabulary) + 2]
        signs += [
            vocabulary.index(character) + 1 if character in vocabulary else len(vocabulary) + 1 for character in text
        ]
        signs += [len(vocabulary) + 3]
        while len(signs) % (length + 1):
            signs.append(0)
        for start in range(0, len(signs), length + 1):
            windows.append(signs[start : start + length + 1])
            rows.append(row)
    return windows, rows


@pytest.mark.parametrize("length", [1, 4, 7])
def test_windows_of_characters_equal_a_loop_over_them(length):
    texts = ["", "a", "ab", "abc!", "bacé" * 5, "\n", "a" * (3 * length + 1), "c" * (length - 1)]
    encoded = CharacterEncoder(sequence_length=length, vocabulary="abc\n")({"text": texts})
    windows, rows = character_windows(texts, length, "abc\n")
    assert encoded.tensors[0].tolist() == windows
    assert encoded.rows.tolist() == rows


def test_inputs_and_targets_are_one_character_apart():
    encode = CharacterEncoder(sequence_length=5)
    encoded = encode({"text": ["To be, or not"]})
    inputs, targets = encode.serve(encoded.tensors, None)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs[0, 0] == 88  # start
    assert 89 in targets  # end


def test_ready_windows_keep_their_characters_and_take_the_next_from_its_column():
    encode = CharacterEncoder(text_column="x", next_column="y", sequence_length=3, vocabulary="abc")
    inputs, targets = encode.serve(encode({"x": ["abc", "c?a"], "y": ["b", "?"]}), None)
    assert inputs.tolist() == [[1, 2, 3], [3, 4, 1]]
    assert targets.tolist() == [[2, 3, 2], [4, 1, 4]]


def test_a_ready_window_of_another_length_is_refused_by_row():
    encode = CharacterEncoder(text_column="x", next_column="y", sequence_length=3)
    with pytest.raises(ValueError, match="must hold 3 characters and next_column='y' one, got 5 in all in row 1"):
        encode({"x": ["abc", "abcd"], "y": ["a", "a"]})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CharacterEncoder(sequence_length=0), "sequence_length must be at least 1, got 0"),
        (lambda: CharacterEncoder(vocabulary="abca"), "vocabulary must hold each character once, got 'a' twice"),
        (lambda: WordEncoder(sequence_length=0), "sequence_length must be at least 1, got 0"),
        (lambda: WordEncoder(vocabulary_size=0), "vocabulary_size must be at least 1, got 0"),
        (lambda: TagEncoder(num_tags=0), "num_tags must be at least 1, got 0"),
        (lambda: WordEncoder()({"tokens": ["a"]}), "the vocabulary is not known yet; call fit"),
    ],
)
def test_text_encoders_refuse_what_cannot_be_encoded(build, message):
    with pytest.raises(ValueError, match=message):
        build()


SENTENCES = ["how to sort a list", "a", "", "list " * 7, "to  be", "sort this list how to sort"]


def word_sequence(sentence, vocabulary, length):
    words = [word for word in sentence.split(" ") if word][:length]
    signs = [len(vocabulary) + 2]
    for word in words:
        signs.append(vocabulary.index(word) + 1 if word in vocabulary else len(vocabulary) + 1)
    if len(words) < length:
        signs.append(len(vocabulary) + 3)
    return signs + [0] * (length + 1 - len(signs))


@pytest.mark.parametrize("length", [1, 5, 20])
def test_sentences_equal_a_loop_over_their_words(length):
    vocabulary = ("list", "to", "sort")
    encode = WordEncoder(sequence_length=length, vocabulary=vocabulary)
    expected = torch.tensor([word_sequence(sentence, vocabulary, length) for sentence in SENTENCES])
    inputs, targets = encode.serve(encode({"tokens": SENTENCES}), None)
    assert torch.equal(inputs, expected[:, :-1])
    assert torch.equal(targets, expected[:, 1:])
    lists = [[word for word in sentence.split(" ") if word] for sentence in SENTENCES]
    assert torch.equal(encode({"tokens": lists})[0], encode({"tokens": SENTENCES})[0])


@pytest.mark.parametrize("as_lists", [False, True])
def test_a_vocabulary_is_the_most_frequent_words_and_ties_go_by_the_alphabet(as_lists):
    column = [sentence.split(" ") for sentence in SENTENCES] if as_lists else SENTENCES
    encode = WordEncoder(vocabulary_size=4).fit(Dataset.from_dict({"tokens": column}))
    # list 9, sort 3, to 3, a 2, how 2
    assert encode.vocabulary == ("list", "sort", "to", "a")
    assert encode.num_tokens == 8


def test_a_vocabulary_comes_from_a_file_with_or_without_counts(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("the 312\nto 299\n\nsort\nlist 5\n")
    encode = WordEncoder(vocabulary=str(file), vocabulary_size=3).fit(Dataset.from_dict({"tokens": ["list"]}))
    assert encode.vocabulary == ("the", "to", "sort")


QUESTIONS = {
    "tokens": ["how to sort a list in python", "what", "", "sort sort this"],
    "title": ["sort list", "list ?", "", "a list"],
    "tags": ["python|list", "c++", "", "python|unknown"],
}


def test_bags_and_tags_equal_means_and_sums_of_one_hot_rows():
    words, tags = ("sort", "list", "a"), ("c++", "python", "list", "java")
    encode = TagEncoder(vocabulary=words, vocabulary_size=3, tags=tags, num_tags=4)
    bags, targets = encode(QUESTIONS)
    for row in range(4):
        text = (QUESTIONS["tokens"][row] + " " + QUESTIONS["title"][row]).split()
        one_hot = np.zeros((len(text), 4))  # the last column is for all other words
        for place, word in enumerate(text):
            one_hot[place, words.index(word) if word in words else 3] = 1
        expected = one_hot.mean(axis=0)[:3] if text else np.zeros(3)
        np.testing.assert_allclose(bags[row].numpy(), expected, atol=1e-7)
        assert targets[row].tolist() == [float(tag in QUESTIONS["tags"][row].split("|")) for tag in tags]
    assert bags.dtype == targets.dtype == torch.float32


def test_tag_vocabularies_count_text_and_title_and_keep_the_networks_widths():
    encode = TagEncoder(vocabulary_size=2, num_tags=10).fit(Dataset.from_dict(QUESTIONS))
    assert encode.vocabulary == ("list", "sort")  # 4 and 4
    assert encode.tags == ("python", "c++", "list", "unknown")
    bags, targets = encode(QUESTIONS)
    assert bags.shape == (4, 2)
    assert targets.shape == (4, 10)


def test_titles_are_left_out_where_there_are_none():
    encode = TagEncoder(title_column=None, vocabulary=("what",), vocabulary_size=1, tags=("c++",), num_tags=1)
    assert encode.columns == {"tokens_column": "tokens", "tags_column": "tags"}
    assert encode({"tokens": ["what"], "tags": [["c++"]]})[0].tolist() == [[1.0]]
