"""GLUE, the third of the paper's evaluations: classes, or a number, of a sentence or a pair of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_iclr.pmi_masking.finetuning import Classification, LabelledBatch
from lightning_iclr.pmi_masking.finetuning_data import LabelledDataModule, LabelledRows, Split
from lightning_iclr.pmi_masking.glue import accuracy, correlations, find_task
from lightning_iclr.tables import DataFiles, select_split

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetDict

PARTS = ("matched", "mismatched")


class TextClassification(Classification):
    """Classify a sentence or a pair of sentences, or give them a number (GLUE).

    The loss is the cross entropy, or for numbers the squared error. Scores, times 100, go by the task, and
    ``val/score`` is the one that BERT reports: Matthews' correlation for CoLA, F1 for MRPC and QQP, Spearman's
    correlation for STS-B, accuracy else. MNLI's two parts are also scored by themselves (``val/accuracy_matched``).

    Args:
        net: A network of ``transformers`` with the task's head, or any that returns what such a one does; the settings
            of one from scratch, with ``model_type``; the name or folder of a pretrained one, such as
            `MaskedLM.save_pretrained` writes; or a checkpoint (``.ckpt``) of a `MaskedLM` that a recipe trained.
        task: Task of GLUE; ``None`` for one of your own.
        num_classes: Classes of a task of your own, scored by accuracy; 1 for numbers, scored by correlations.
        optimizer: Builds the optimizer from parameter groups; weight decay does not reach biases and norms, as in BERT.
        lr_scheduler: Builds the schedule from the optimizer; ``None`` takes BERT's, up and down in straight lines.
        warmup: Share of the steps on the way up, without an ``lr_scheduler``.
        seed: Seed of dropout.
        compile: Compile the network in place with ``torch.compile``.

    Raises:
        ValueError: There is no such task, not exactly one of ``task`` and ``num_classes`` is given, or what
            `FineTuning` raises. In `setup`: the data have other classes.

    Examples:
        >>> small = {"model_type": "bert", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1}
        >>> module = TextClassification({**small, "num_attention_heads": 2, "intermediate_size": 16}, task="mnli")
        >>> module(input_ids=torch.ones(2, 5, dtype=torch.long)).shape
        torch.Size([2, 3])
    """

    head = "AutoModelForSequenceClassification"
    groups = PARTS

    def __init__(
        self,
        net: nn.Module | dict[str, Any] | str,
        task: str | None = None,
        num_classes: int | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.1,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        if (task is None) == (num_classes is None):
            raise ValueError(f"either task or num_classes must be given, got {task!r} and {num_classes}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        classes = num_classes if task is None else find_task(task).num_classes
        super().__init__(net, optimizer, lr_scheduler, warmup, seed, compile, num_labels=classes)
        self.task, self.num_classes = task, classes

    def setup(self, stage: str) -> None:
        """Check that the data are of the same task."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "task", self.task) != self.task:
            raise ValueError(f"model.task must be data.task, {data.task}, got {self.task}")
        found = len(getattr(data, "class_names", []))
        if self.task is None and found > 1 and found != self.num_classes:
            raise ValueError(
                f"model.num_classes must be the number of the data's classes, {found}, got {self.num_classes}"
            )

    def loss(self, logits: Tensor, batch: LabelledBatch) -> Tensor:
        if self.num_classes == 1:
            return F.mse_loss(logits[:, 0].float(), batch.labels.float(), reduction="none")
        return super().loss(logits, batch)

    def predictions(self, logits: Tensor) -> Tensor:
        return logits.float() if self.num_classes == 1 else super().predictions(logits)

    def measure(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        if self.task is not None:
            task = find_task(self.task)
            found, score = task.measure(predictions, labels), task.score
        elif self.num_classes == 1:
            found, score = correlations(predictions, labels), "spearman"
        else:
            found, score = accuracy(predictions, labels), "accuracy"
        return {**found, "score": found[score]}


class TextClassificationDataModule(LabelledDataModule):
    """Serve sentences or pairs of them with a class or number each, in the columns of ``nyu-mll/glue``.

    A text that is too long is cut at its end, of two the longer first.

    Args:
        dataset: Hub id, folder, file, or, in Python, a ``Dataset`` or ``DatasetDict``.
        tokenizer: Name or folder of the network's tokenizer, a ``tokenizer.json``, ``embedded`` or, in Python, a fast
            tokenizer of ``transformers``.
        task: Task of GLUE, which says what the defaults of the following are; ``None`` for one of your own.
        text_columns: One column of texts or two.
        label_column: Column of classes (integers from 0, or named) or numbers.
        id_column: Column that names predicted rows; they are numbered where there is none.
        num_classes: Classes; 1 for numbers.
        config_name: Configuration of a hub dataset; ``None`` takes the task.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        train_split: Training part, with slices and sums.
        val_split: Validation part, likewise; ``None`` takes the task's, which is both parts of MNLI. Those whose name
            ends in ``_matched`` or ``_mismatched`` are also scored by themselves.
        test_split: Test part, likewise; ``None`` for none. Those of the hub have no labels: predict them.
        predict_split: Part to predict, whose labels are not read; ``None`` takes the test or else validation part.
        max_length: Tokens of an input, special ones included.
        batch_size: Rows that one process takes at a step.
        eval_batch_size: The same in evaluation.
        seed: Seed of the orders.
        num_workers: Processes that load.

    Raises:
        ValueError: There is no such task, a task of your own lacks ``text_columns`` or ``num_classes``, or a number is
            outside its range. In `setup`: a column is missing, or a label is none of the classes.
    """

    def __init__(
        self,
        dataset: str | Table | DatasetDict = "nyu-mll/glue",
        *,
        tokenizer: Any,
        task: str | None = None,
        text_columns: Sequence[str] | None = None,
        label_column: str = "label",
        id_column: str = "idx",
        num_classes: int | None = None,
        config_name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        predict_split: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        known = None if task is None else find_task(task)
        if known is not None:
            text_columns, num_classes = text_columns or known.columns, num_classes or known.num_classes
        if not text_columns or len(text_columns) > 2 or isinstance(text_columns, str):
            raise ValueError(f"text_columns must be one column or two, without a task, got {text_columns}")
        if num_classes is None or num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, without a task, got {num_classes}")
        super().__init__(
            dataset,
            tokenizer=tokenizer,
            config_name=task if config_name is None and dataset == "nyu-mll/glue" else config_name,
            revision=revision,
            data_files=data_files,
            train_split=train_split,
            val_split=val_split or ("validation" if known is None else known.val_split),
            test_split=test_split,
            predict_split=predict_split,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.task, self.text_columns, self.num_classes = task, tuple(text_columns), num_classes
        self.label_column, self.id_column = label_column, id_column
        self.class_names = [str(number) for number in range(num_classes)] if num_classes > 1 else []

    def columns(self, split: Split) -> Mapping[str, str]:
        labels = {} if split == "predict" else {"label_column": self.label_column}
        return {**{f"text_columns[{place}]": name for place, name in enumerate(self.text_columns)}, **labels}

    def select(self, tables: dict[str, Table], spec: str, argument: str) -> Table:
        from datasets import concatenate_datasets

        parts = []
        for name in spec.split("+"):
            table = select_split(tables, name.strip(), argument)
            ends = [number for number, part in enumerate(PARTS) if name.split("[")[0].strip().endswith(f"_{part}")]
            parts.append(table.add_column("group", [ends[0] if ends else -1] * len(table)))
        return concatenate_datasets(parts)

    def features(self, table: Table, split: Split) -> LabelledRows:
        texts = [self.encoder.encode(table[name][:], f"tokenizing {name}") for name in self.text_columns]
        inputs = [self._cut([each.ids for each in row]) for row in zip(*texts, strict=True)]
        numbered = self.id_column not in table.column_names
        ids = list(range(len(table))) if numbered else table[self.id_column][:]
        labels = [0] * len(table) if split == "predict" else self._labels(table, split)
        return LabelledRows(inputs, labels, table["group"][:], ids)

    def _cut(self, texts: list[np.ndarray]) -> list[np.ndarray]:
        """Cut texts to what an input holds, the longer of two first."""
        room = self.max_length - self.encoder.specials(pair=len(texts) == 2)
        if len(texts) == 1:
            return [texts[0][:room]]
        first, second = map(len, texts)
        if first + second > room:
            shorter = min(first, second, room // 2)
            first, second = (room - shorter, shorter) if first > second else (shorter, room - shorter)
        return [texts[0][:first], texts[1][:second]]

    def _labels(self, table: Table, split: Split) -> list[Any]:
        feature = table.features[self.label_column]
        names = getattr(feature, "names", None)
        if names is not None and len(names) == self.num_classes:
            self.class_names = list(names)
        found = table[self.label_column][:]
        if self.num_classes == 1:
            wrong = next((place for place, label in enumerate(found) if not isinstance(label, int | float)), None)
            expected = "a number"
        else:
            classes = range(self.num_classes)
            wrong = next((p for p, label in enumerate(found) if type(label) is not int or label not in classes), None)
            expected = f"a class from 0 to {self.num_classes - 1}"
        if wrong is not None:
            raise ValueError(
                f"{self.label_column} must be {expected} in each row of {split}_split, got {found[wrong]!r} in row "
                f"{wrong}"
            )
        return list(map(float, found)) if self.num_classes == 1 else list(found)
