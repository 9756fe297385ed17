"""Two federated tasks that need no download; `ZipfTags` is a third, which is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_iclr.embedded import load_digits, load_shakespeare
from lightning_iclr.fedopt.data import FederatedDataModule, Partition
from lightning_iclr.fedopt.encoders import ImageEncoder
from lightning_iclr.fedopt.partition import DirichletPartitioner, KeyPartitioner
from lightning_iclr.fedopt.text_encoders import CharacterEncoder

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table


class FederatedDigits(FederatedDataModule):
    """Serve the embedded 1,797 handwritten digits to clients: images (1, 8, 8) in [0, 1], labels 0 to 9.

    360 digits are held out, 180 for validation and 180 for the test, in equal shares of all classes. The other 1,437
    are the pool that 100 clients draw 14 each from, without replacement, each by class shares of its own from a
    Dirichlet distribution. ``split_seed`` seeds both.

    Args:
        num_clients: Clients.
        alpha: Concentration of the clients' class shares, above 0: the smaller, the less alike clients are.
        examples_per_client: Digits of each client.
        partition: Another partition of the training digits in place of this one.
        clients_per_round: Size of a cohort.
        batch_size: Digits of a local batch.
        eval_batch_size: Digits that one process takes at a step in evaluation.
        split_seed: Seed of the held-out parts and of the partition.
        kwargs: The other arguments of `FederatedDataModule`: ``local_epochs``, ``max_local_steps``, ``seed``, ...

    Raises:
        ValueError: A number is outside its range.

    Examples:
        >>> digits = FederatedDigits()
        >>> digits.setup()
        >>> [len(digits.evaluation_loader(part).dataset) for part in ("train", "val", "test")]
        [1400, 180, 180]
    """

    def __init__(
        self,
        *,
        num_clients: int = 100,
        alpha: float = 0.1,
        examples_per_client: int = 14,
        partition: Partition | None = None,
        clients_per_round: int | float = 10,
        batch_size: int = 5,
        eval_batch_size: int = 180,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if partition is None:
            partition = DirichletPartitioner(
                num_clients, alpha, label_column="label", examples_per_client=examples_per_client, seed=split_seed
            )
        super().__init__(
            "the embedded digits",
            encode=ImageEncoder(white=16.0),
            partition=partition,
            clients_per_round=clients_per_round,
            val_size=180,
            test_size=180,
            stratify_column="label",
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            split_seed=split_seed,
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Do nothing: the digits come with the package."""

    def tables(self) -> dict[str, Table]:
        """Return the digits."""
        return {"train": load_digits()}


class ShakespeareRoles(FederatedDataModule):
    """Serve the embedded plays to clients, one for each speaking role: the next character in windows of 80.

    A client is a (play, role) pair with at least two speeches: 1,123 of the 1,380. Its speeches are split in time: the
    last fifth is its test, the tenth before that its validation; a client with few has no validation. Speeches become
    windows as in the original, see `CharacterEncoder`. Clients are very unequal: the 50 with the most text have 30 % of
    it. The published benchmark has 715 clients of another edition: its numbers and those of this task do not compare.

    Args:
        clients_per_round: Size of a cohort.
        batch_size: Windows of a local batch.
        eval_batch_size: Windows that one process takes at a step in evaluation.
        sequence_length: Characters of a window.
        min_speeches: Speeches that a role needs to be a client.
        client_split: Shares (validation, test) of each client's speeches, the last ones.
        kwargs: The other arguments of `FederatedDataModule`: ``local_epochs``, ``max_local_steps``, ``seed``, ...

    Raises:
        ValueError: A number is outside its range.

    Examples:
        >>> roles = ShakespeareRoles()
        >>> roles.setup()
        >>> len(roles.client_datasets("test")[1])
        1123
    """

    def __init__(
        self,
        *,
        clients_per_round: int | float = 10,
        batch_size: int = 4,
        eval_batch_size: int = 256,
        sequence_length: int = 80,
        min_speeches: int = 2,
        client_split: tuple[float, float] = (0.1, 0.2),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            "the embedded plays",
            encode=CharacterEncoder(sequence_length=sequence_length),
            partition=KeyPartitioner(("play", "role"), min_examples=min_speeches),
            clients_per_round=clients_per_round,
            client_split=client_split,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Do nothing: the plays come with the package."""

    def tables(self) -> dict[str, Table]:
        """Return the speeches."""
        return {"train": load_shakespeare()}
