"""The generated tags: what was fixed in advance holds, and the data are the same everywhere."""

import hashlib
import math

import numpy as np
import pytest
import torch

from lightning_iclr.fedopt.loader import Place
from lightning_iclr.fedopt.zipf import BagEncoder, ZipfTags, generate_zipf_texts

DIGEST = "753ae250d5b08467d31d2302c946d88af07d11b307af71bef2c7a0811550b851"  # of seed 0


@pytest.fixture(scope="module")
def texts():
    return generate_zipf_texts()


@pytest.fixture(scope="module")
def data():
    data = ZipfTags()
    data.prepare_data()
    data.setup()
    return data


def zipf(size, exponent):
    shares = [rank**-exponent for rank in range(1, size + 1)]
    return np.array(shares) / sum(shares)


def test_the_data_are_fixed(texts):
    arrays = (texts.client, texts.words, texts.tags, texts.markers)
    digest = hashlib.sha256(b"".join(array.astype("<i4").tobytes() for array in arrays)).hexdigest()
    assert texts.words.shape == (24_881, 30)
    assert digest == DIGEST
    assert not np.array_equal(generate_zipf_texts(seed=1).words[:100], texts.words[:100])


def test_texts_have_10_to_30_words_and_1_to_3_tags_and_clients_20_to_400_texts(texts):
    lengths = (texts.words >= 0).sum(axis=1)
    assert (texts.words[np.arange(30) < lengths[:, None]] >= 0).all()  # nothing after a text's end
    n = len(lengths)
    counts = np.bincount(lengths, minlength=31)[10:]
    assert counts.sum() == n
    assert np.abs(counts - n / 21).max() < 4.5 * math.sqrt(n / 21)
    sizes = np.bincount(texts.client)
    assert len(sizes) == 500
    assert (sizes.min(), sizes.max()) == (20, 400)
    # More than x with probability (20 / x) ** 1.5: a binomial count of clients.
    for x in (40, 80, 160):
        p = (20 / x) ** 1.5
        assert abs((sizes >= x).sum() - 500 * p) < 4 * math.sqrt(500 * p * (1 - p))
    num_tags = (texts.tags >= 0).sum(axis=1)
    assert set(num_tags) == {1, 2, 3}
    for own in texts.tags[:500]:
        tags = own[own >= 0]
        assert sorted(set(tags.tolist())) == tags.tolist()


def test_markers_are_rare_words_of_one_tag_each(texts):
    assert texts.markers.shape == (100, 10)
    assert len(np.unique(texts.markers)) == 1000
    assert texts.markers.min() >= 200
    assert texts.markers.max() < 2000
    # Drawn evenly from ranks 200 to 1999 without replacement: a mean of 1099.5, its variance 1800^2/12 / 1000 * 4/9.
    assert abs(texts.markers.mean() - 1099.5) < 4 * math.sqrt(1800**2 / 12 / 1000 * 4 / 9)


def test_words_are_a_marker_of_the_texts_tags_or_follow_zipfs_law(texts):
    shares = zipf(2000, 1.1)
    marker_of = np.full(2000, -1)
    for tag, own in enumerate(texts.markers):
        marker_of[own] = tag
    words = texts.words[texts.words >= 0]
    n = len(words)
    # A word of rank r is background with probability 0.7; markers are above rank 200.
    for rank in (0, 1, 2, 9, 99):
        p = 0.7 * shares[rank]
        assert abs((words == rank).sum() - n * p) < 4.5 * math.sqrt(n * p * (1 - p))
    tags = marker_of[texts.words]
    own = (tags[:, :, None] == texts.tags[:, None, :]).any(axis=2) & (texts.words >= 0) & (tags >= 0)
    # 0.3 drawn on purpose, and by chance 0.7 times the share that the text's own markers have in the background.
    background = np.concatenate([shares[texts.markers].sum(axis=1), [0.0]])
    p = 0.3 + 0.7 * background[texts.tags].sum(axis=1)
    lengths = (texts.words >= 0).sum(axis=1)
    expected, variance = (lengths * p).sum(), (lengths * p * (1 - p)).sum()
    assert abs(own.sum() - expected) < 4.5 * math.sqrt(variance)


def test_the_shares_of_tags_are_zipfs_over_all_clients_and_dirichlets_within_one(texts):
    q, c = zipf(100, 1.0), 5.0
    present = np.zeros((len(texts.client), 101))
    np.put_along_axis(present, texts.tags, 1.0, axis=1)  # -1 is the last column
    by_client = np.stack([present[texts.client == client, :100].mean(axis=0) for client in range(500)])
    # A client's share of a tag is Beta(c q, c (1 - q)), and none of n draws hits it with chance E[(1 - share)^n].
    miss = [np.prod([(c * (1 - q) + i) / (c + i) for i in range(n)], axis=0) for n in (1, 2, 3)]
    expected = 1 - np.mean(miss, axis=0)
    chance = np.random.default_rng(0).beta(c * q, c * (1 - q), size=(20_000, 100))
    chance = np.mean([1 - (1 - chance) ** n for n in (1, 2, 3)], axis=0)
    np.testing.assert_allclose(chance.mean(axis=0), expected, atol=0.01)
    variance = chance.var(axis=0) + (chance * (1 - chance)).mean(axis=0) * np.mean(1 / np.bincount(texts.client))
    assert (np.abs(by_client.mean(axis=0) - expected) < 4.5 * np.sqrt(variance / 500)).all()
    # All of 1, 2 or 3 draws agree: moments of the Dirichlet distribution.
    square = (q * (c * q + 1) / (c + 1)).sum()
    cube = (q * (c * q + 1) * (c * q + 2) / ((c + 1) * (c + 2))).sum()
    single = (texts.tags >= 0).sum(axis=1) == 1
    alone = np.array([single[texts.client == client].mean() for client in range(500)])
    assert abs(alone.mean() - (1 + square + cube) / 3) < 4.5 * alone.std() / math.sqrt(500)
    assert 4 < 1 / square < 6  # "about five"


def test_what_the_description_says_of_the_task_holds(texts):
    counts = np.bincount(texts.tags[texts.tags >= 0], minlength=100)
    assert round(np.sort(counts)[-5:].sum() / counts.sum(), 2) == 0.42
    shares = zipf(2000, 1.1)
    assert round(shares[:200].sum(), 2) == 0.80
    assert round(shares[texts.markers].sum(), 2) == 0.11
    rarest = np.argsort(counts)[:10]
    containing = [(texts.words == word).any(axis=1).mean() for word in texts.markers[rarest].ravel()]
    assert 400 < 1 / np.mean(containing) < 600
    distinct = [len(set(own[own >= 0])) for own in texts.words[:2000]]
    assert 0.007 < np.mean(distinct) / 2000 < 0.01
    found = 0
    marker_of = np.full(2001, -1)
    for tag, own in enumerate(texts.markers):
        marker_of[own] = tag
    for own, tags in zip(texts.words[:3000], texts.tags[:3000], strict=True):
        votes = np.bincount(marker_of[own][marker_of[own] >= 0], minlength=100) + counts / counts.sum()
        found += np.isin(tags[tags >= 0], np.argsort(-votes)[:5]).sum()
    assert round(found / (texts.tags[:3000] >= 0).sum(), 2) == 0.95


def test_bags_and_tags_equal_a_loop():
    columns = {"words": [[0, 2, 2, 3], [1], [3] * 30], "tags": [[0], [1, 2], [2]]}
    encode = BagEncoder(num_words=4, num_tags=3)
    bags, tags = encode.serve(encode(columns), None)
    for row in range(3):
        words = columns["words"][row]
        assert bags[row].tolist() == pytest.approx([words.count(word) / len(words) for word in range(4)])
        assert tags[row].tolist() == [float(tag in columns["tags"][row]) for tag in range(3)]
    assert bags.dtype == tags.dtype == torch.float32


def test_each_client_holds_out_its_last_texts(data, texts):
    sizes = np.bincount(texts.client)
    parts = {part: data.client_datasets(part) for part in ("train", "val", "test")}
    assert all(len(clients) == 500 for _, clients in parts.values())
    held_out = np.floor(sizes * 0.1 + 0.5)
    assert [len(own) for own in parts["test"][1]] == held_out.tolist()
    assert [len(own) for own in parts["val"][1]] == held_out.tolist()
    examples, clients = parts["test"]
    client = int(sizes.argmax())
    rows = np.flatnonzero(texts.client == client)[-int(held_out[client]) :]
    bags, tags = examples.__getitems__(clients[client].tolist())
    for bag, tag, row in zip(bags, tags, rows, strict=True):
        words = texts.words[row][texts.words[row] >= 0]
        np.testing.assert_allclose(bag.numpy(), np.bincount(words, minlength=2000) / len(words), atol=1e-6)
        assert tag.nonzero().flatten().tolist() == texts.tags[row][texts.tags[row] >= 0].tolist()


def test_a_round_serves_bags_of_ten_texts(data):
    loader = data.train_dataloader()
    loader.connect(Place(0, 1, 1, 1, lambda: 0))
    batches = list(loader)
    assert len(batches) == sum(task.steps for task in loader.plan(0).tasks[0])
    for bags, tags in batches:
        assert bags.shape == (len(tags), 2000)
        assert tags.shape == (len(bags), 100)
        torch.testing.assert_close(bags.sum(dim=1), torch.ones(len(bags)))
        assert tags.sum(dim=1).min() >= 1
