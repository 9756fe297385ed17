"""A generated federation with sparse gradients: tags of short texts whose words follow Zipf's law.

The paper's largest gains are on sparse data, above all on tag prediction from bags of words (Stack Overflow LR), which
needs a download of some hundred million sentences. This is a small stand-in whose every property is known.

How a text comes about:

1. There are V words; background text draws word r (from 0) with probability proportional to (r + 1)^-1.1.
2. There are T tags; over all clients, tag t (from 0) is drawn with probability q_t proportional to (t + 1)^-1.
3. Each tag owns 10 words of its own, its markers, drawn from the words of rank 200 and more.
4. A client's tag shares come from a Dirichlet distribution with mean q and concentration 5.
5. A text gets 1 to 3 draws from its client's shares (equal ones count once) and 10 to 30 words: each is, with
   probability 0.3, a marker of one of its tags, and else a word of the background.

The constants were fixed before anything was trained on them, from this reasoning alone, and no run has changed them:

- *Zipf exponent 1.1, V = 2,000*: natural language has an exponent near 1. The 200 most frequent words then make 80 % of
  the background and say nothing of any tag, so that the average gradient is dominated by a few coordinates. 2,000 x 100
  weights are 200,000 parameters; a text has words for 1 % of them.
- *T = 100, exponent 1*: the most frequent tag has 19 % of the draws, the rarest 0.2 %, which is some 90 texts. Always
  naming the 5 most frequent tags has a recall at 5 of 0.42, so that there is much to gain above what the frequent
  tags give.
- *Markers of rank 200 and more*: a tag must be told by rare words. 10 a tag take 1,000 of the 1,800 rare words. A
  single marker of a rare tag is in about one text of 500, in half of them by chance.
- *Share of markers 0.3 of 20 words*: 6 of 20 words are markers, about 3 a tag, against 1 or 2 markers of other tags by
  chance, as a tenth of the background is markers. So tags can be told, but no word alone decides. Whoever knows all
  markers and counts them finds 95 % of the tags among 5.
- *500 clients, concentration 5*: a client has "a few topics", about five, by the inverse of the sum of its squared
  shares. So a cohort of 10 is told about the frequent tags in every round and about a rare one seldom.
- *Sizes*: a client has at least 20 texts, x or more with probability (20 / x)^1.5, and 400 at most: about 50 on
  average. Natural clients are unequal; the cap keeps a few of them from being all that is learned from.

All draws are inverted from uniform doubles of PCG64, whose stream numpy keeps: the data are the same everywhere, and a
test pins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from lightning_iclr.fedopt.data import FederatedDataModule
from lightning_iclr.fedopt.encoders import Columns
from lightning_iclr.fedopt.partition import KeyPartitioner

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table

NUM_WORDS, WORD_EXPONENT = 2_000, 1.1
NUM_TAGS, TAG_EXPONENT = 100, 1.0
NUM_CLIENTS, CONCENTRATION = 500, 5.0
FIRST_MARKER_RANK, MARKERS_PER_TAG, MARKER_SHARE = 200, 10, 0.3
MAX_TAGS = 3
MIN_LENGTH, MAX_LENGTH = 10, 30
MIN_TEXTS, MAX_TEXTS, SIZE_EXPONENT = 20, 400, 1.5
_STICKS = 128  # what is left of a client's shares after them is below 1e-10


@dataclass(frozen=True)
class ZipfTexts:
    """The generated federation.

    Attributes:
        client: Client of each text (N,), ascending.
        words: Words of each text (N, L), by rank; -1 after its end.
        tags: Tags of each text (N, 3), ascending; -1 for none.
        markers: Words that each tag owns (T, 10).
    """

    client: np.ndarray
    words: np.ndarray
    tags: np.ndarray
    markers: np.ndarray


def generate_zipf_texts(seed: int = 0) -> ZipfTexts:
    """Generate the federation of this module's description.

    Args:
        seed: Seed of all draws. The recipes use 0, and comparisons of several seeds vary the training's seed alone.

    Examples:
        >>> texts = generate_zipf_texts()
        >>> int(texts.client.max()), texts.markers.shape
        (499, (100, 10))
    """
    random = np.random.default_rng(seed).random
    tag_shares = np.cumsum(_zipf(NUM_TAGS, TAG_EXPONENT))
    rare = np.arange(FIRST_MARKER_RANK, NUM_WORDS)
    markers = rare[np.argsort(random(len(rare)))][: NUM_TAGS * MARKERS_PER_TAG].reshape(NUM_TAGS, MARKERS_PER_TAG)

    # Sethuraman's construction: pieces of a broken stick, each on a tag drawn from q, are Dirichlet shares.
    pieces = 1 - random((NUM_CLIENTS, _STICKS)) ** (1 / CONCENTRATION)
    left = np.cumprod(1 - pieces, axis=1)
    sticks = 1 - left  # what the pieces up to each add up to
    sticks[:, -1] = 1
    owners = _invert(tag_shares, random((NUM_CLIENTS, _STICKS)))

    sizes = np.minimum(np.floor(MIN_TEXTS * (1 - random(NUM_CLIENTS)) ** (-1 / SIZE_EXPONENT)), MAX_TEXTS).astype(int)
    client = np.repeat(np.arange(NUM_CLIENTS), sizes)
    texts = len(client)
    piece = (random((texts, MAX_TAGS))[:, :, None] >= sticks[client][:, None, :]).sum(axis=2)
    drawn = np.take_along_axis(owners[client], piece, axis=1)
    drawn[np.arange(MAX_TAGS) > np.floor(random(texts) * MAX_TAGS)[:, None]] = NUM_TAGS
    drawn.sort(axis=1)
    drawn[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = NUM_TAGS
    drawn.sort(axis=1)
    num_tags = (drawn < NUM_TAGS).sum(axis=1)

    shape = (texts, MAX_LENGTH)
    background = _invert(np.cumsum(_zipf(NUM_WORDS, WORD_EXPONENT)), random(shape))
    tag = np.take_along_axis(drawn, np.floor(random(shape) * num_tags[:, None]).astype(int), axis=1)
    marker = markers[tag, np.floor(random(shape) * MARKERS_PER_TAG).astype(int)]
    words = np.where(random(shape) < MARKER_SHARE, marker, background)
    lengths = MIN_LENGTH + np.floor(random(texts) * (MAX_LENGTH - MIN_LENGTH + 1))
    words[np.arange(MAX_LENGTH) >= lengths[:, None]] = -1
    drawn[drawn == NUM_TAGS] = -1
    return ZipfTexts(client, words, drawn, markers)


@dataclass(frozen=True)
class BagEncoder:
    """Encode lists of word numbers as shares (B, V) and lists of tag numbers as zeros and ones (B, T).

    Args:
        words_column: Column of lists of word numbers from 0.
        tags_column: Column of lists of tag numbers from 0.
        num_words: Words; V.
        num_tags: Tags; T.

    Examples:
        >>> encode = BagEncoder(num_words=3, num_tags=2)
        >>> encode.serve(encode({"words": [[0, 0, 2, 2]], "tags": [[1]]}), None)
        (tensor([[0.5000, 0.0000, 0.5000]]), tensor([[0., 1.]]))
    """

    words_column: str = "words"
    tags_column: str = "tags"
    num_words: int = NUM_WORDS
    num_tags: int = NUM_TAGS

    augments = False

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by argument."""
        return {"words_column": self.words_column, "tags_column": self.tags_column}

    def __call__(self, columns: Columns) -> tuple[Tensor, ...]:
        """Return word numbers (B, L) and tag numbers (B, M), with V and T after the end of a row."""
        return (
            _padded(columns[self.words_column], MAX_LENGTH, self.num_words),
            _padded(columns[self.tags_column], MAX_TAGS, self.num_tags),
        )

    def serve(self, tensors: tuple[Tensor, ...], generators: Sequence[Generator] | None) -> tuple[Tensor, ...]:
        """Return bags (B, V) and tags (B, T)."""
        words, tags = tensors
        counts = _counts(words.long(), self.num_words)
        return counts / counts.sum(dim=1, keepdim=True), _counts(tags.long(), self.num_tags)


class ZipfTags(FederatedDataModule):
    """Serve the generated texts to clients: bags of words (2,000,) and tags (100,) of zeros and ones.

    500 clients with 20 to 400 texts each, about 25,000 in all, whose tags depend on rare words; see
    `lightning_iclr.fedopt.zipf` for how they come about. Of each client's texts the last tenth is for the test and the
    tenth before for validation. Inputs are words' shares of their text, as in the paper's Stack Overflow LR.

    Args:
        clients_per_round: Size of a cohort.
        batch_size: Texts of a local batch.
        eval_batch_size: Texts that one process takes at a step in evaluation.
        client_split: Shares (validation, test) of each client's texts, the last ones.
        data_seed: Seed of the generator.
        kwargs: The other arguments of `FederatedDataModule`: ``local_epochs``, ``max_local_steps``, ``seed``, ...

    Raises:
        ValueError: A number is outside its range.

    Examples:
        >>> data = ZipfTags()
        >>> data.setup()
        >>> bags, tags = next(iter(data.val_dataloader()))
        >>> bags.shape, tags.shape
        (torch.Size([500, 2000]), torch.Size([500, 100]))
    """

    def __init__(
        self,
        *,
        clients_per_round: int | float = 10,
        batch_size: int = 10,
        eval_batch_size: int = 500,
        client_split: tuple[float, float] = (0.1, 0.1),
        data_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            "the generated texts",
            encode=BagEncoder(),
            partition=KeyPartitioner("client"),
            clients_per_round=clients_per_round,
            client_split=client_split,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            **kwargs,
        )
        self.data_seed = data_seed

    def prepare_data(self) -> None:
        """Do nothing: the texts are generated."""

    def tables(self) -> dict[str, Table]:
        """Return the texts, with columns ``client``, ``words`` and ``tags``."""
        from datasets import Dataset

        texts = generate_zipf_texts(self.data_seed)
        return {
            "train": Dataset.from_dict(
                {"client": texts.client, "words": _lists(texts.words), "tags": _lists(texts.tags)}
            )
        }


def _zipf(size: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    shares: np.ndarray = weights / weights.sum()
    return shares


def _invert(cumulative: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    # Rounding may leave the last sum below 1.
    drawn: np.ndarray = np.minimum(np.searchsorted(cumulative, uniform, side="right"), len(cumulative) - 1)
    return drawn


def _lists(numbers: np.ndarray) -> list[np.ndarray]:
    return [row[row >= 0] for row in numbers]


def _padded(lists: Sequence[Sequence[int]], width: int, padding: int) -> Tensor:
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in lists], dtype=torch.int16)


def _counts(numbers: Tensor, size: int) -> Tensor:
    counts = torch.zeros(len(numbers), size + 1)
    counts.scatter_add_(1, numbers, torch.ones(numbers.shape))
    return counts[:, :size]
