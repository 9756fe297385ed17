"""RACE, the second of the paper's evaluations: which of four options answers a question about an article."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_iclr.pmi_masking.finetuning import Classification
from lightning_iclr.pmi_masking.finetuning_data import LabelledDataModule, LabelledRows, Split
from lightning_iclr.tables import DataFiles

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetDict

LEVELS = ("middle", "high")


class MultipleChoice(Classification):
    """Choose the option that answers a question about an article (RACE).

    The network gives a number to each option beside the article, and the loss is the cross entropy over the options.
    ``val/score`` is ``val/accuracy``, in percent; ``val/accuracy_middle`` and ``_high`` are those of RACE's two levels.

    Batches are `LabelledBatch` with inputs of (B, O, L) for O options.

    Args:
        net: A network of ``transformers`` with the task's head, or any that returns what such a one does; the settings
            of one from scratch, with ``model_type``; the name or folder of a pretrained one, such as
            `MaskedLM.save_pretrained` writes; or a checkpoint (``.ckpt``) of a `MaskedLM` that a recipe trained.
        optimizer: Builds the optimizer from parameter groups; weight decay does not reach biases and norms, as in BERT.
        lr_scheduler: Builds the schedule from the optimizer; ``None`` takes BERT's, up and down in straight lines.
        warmup: Share of the steps on the way up, without an ``lr_scheduler``.
        num_classes: Options of a question.
        seed: Seed of dropout.
        compile: Compile the network in place with ``torch.compile``.

    Raises:
        ValueError: ``num_classes`` is below 2, or what `FineTuning` raises. In `setup`: the data have another number of
            options.

    Examples:
        >>> small = {"model_type": "bert", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1}
        >>> module = MultipleChoice({**small, "num_attention_heads": 2, "intermediate_size": 16})
        >>> module(input_ids=torch.ones(2, 4, 5, dtype=torch.long)).shape
        torch.Size([2, 4])
    """

    head = "AutoModelForMultipleChoice"
    groups = LEVELS

    def __init__(
        self,
        net: nn.Module | dict[str, Any] | str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.1,
        num_classes: int = 4,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        super().__init__(net, optimizer, lr_scheduler, warmup, seed, compile)
        self.num_classes = num_classes

    def setup(self, stage: str) -> None:
        """Check that the data have as many options."""
        found = len(getattr(getattr(self.trainer, "datamodule", None), "class_names", [])) or self.num_classes
        if found != self.num_classes:
            raise ValueError(
                f"model.num_classes must be the number of the data's options, {found}, got {self.num_classes}"
            )

    def measure(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        accuracy = 100 * float(multiclass_accuracy(predictions, labels.long(), self.num_classes, average="micro"))
        return {"accuracy": accuracy, "score": accuracy}


class MultipleChoiceDataModule(LabelledDataModule):
    """Serve questions with options about articles, in the columns of ``ehovy/race``.

    An input is the article, cut at its end to what is left, and the question with an option, which is never cut. The
    option takes the place of a blank (``_``) in the question, and else follows it. Questions whose id begins with
    ``middle`` or ``high`` are also scored by level.

    Args:
        dataset: Hub id, folder, file, or, in Python, a ``Dataset`` or ``DatasetDict``.
        tokenizer: Name or folder of the network's tokenizer, a ``tokenizer.json``, ``embedded`` or, in Python, a fast
            tokenizer of ``transformers``.
        config_name: Configuration of a hub dataset; RACE has ``all``, ``middle`` and ``high``.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        train_split: Training part, with slices and sums.
        val_split: Validation part, likewise.
        test_split: Test part, likewise; ``None`` for none.
        predict_split: Part to predict, whose answers are not read; ``None`` takes the test or else validation part.
        id_column: Column of the questions' names.
        article_column: Column of the articles.
        question_column: Column of the questions.
        options_column: Column of the lists of options, as many for each question.
        answer_column: Column of the right option's letter, ``A`` for the first.
        max_length: Tokens of an input, special ones included.
        batch_size: Questions that one process takes at a step.
        eval_batch_size: The same in evaluation.
        seed: Seed of the orders.
        num_workers: Processes that load.

    Raises:
        ValueError: A number is outside its range. In `setup`: a column is missing, an answer is none of the options'
            letters, or ``max_length`` is too small for a question with an option.
    """

    def __init__(
        self,
        dataset: str | Table | DatasetDict = "ehovy/race",
        *,
        tokenizer: Any,
        config_name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        predict_split: str | None = None,
        id_column: str = "example_id",
        article_column: str = "article",
        question_column: str = "question",
        options_column: str = "options",
        answer_column: str = "answer",
        max_length: int = 512,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            dataset,
            tokenizer=tokenizer,
            config_name=config_name,
            revision=revision,
            data_files=data_files,
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            predict_split=predict_split,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.id_column, self.article_column, self.question_column = id_column, article_column, question_column
        self.options_column, self.answer_column = options_column, answer_column
        self.class_names: list[str] = []

    def columns(self, split: Split) -> Mapping[str, str]:
        names = ["id_column", "article_column", "question_column", "options_column"]
        names += [] if split == "predict" else ["answer_column"]
        return {name: getattr(self, name) for name in names}

    def features(self, table: Table, split: Split) -> LabelledRows:
        wanted = list(self.columns(split).values())
        questions = list(table.select_columns(wanted))
        ids = [str(row[self.id_column]) for row in questions]
        number = len(self.class_names) or len(questions[0][self.options_column])
        self.class_names = [chr(ord("A") + place) for place in range(number)]
        labels = [self._label(row, split) for row in questions]
        texts = dict.fromkeys(row[self.article_column] for row in questions)
        articles = dict(zip(texts, self.encoder.encode(list(texts), "tokenizing articles"), strict=True))
        asked = [fill_in(row[self.question_column], option) for row in questions for option in row[self.options_column]]
        second = self.encoder.encode(asked, "tokenizing options")
        inputs = []
        for place, row in enumerate(questions):
            options = [each.ids for each in second[place * number : (place + 1) * number]]
            room = self.max_length - self.encoder.specials(pair=True) - max(map(len, options))
            if room < 1:
                raise ValueError(
                    f"max_length must leave room for an article beside question {ids[place]} ({split}_split) and its "
                    f"options, got {self.max_length} for more than {self.max_length - room}"
                )
            inputs.append((articles[row[self.article_column]].ids, options))
        groups = [next((n for n, level in enumerate(LEVELS) if name.startswith(level)), -1) for name in ids]
        return LabelledRows(inputs, labels, groups, ids)

    def collate_inputs(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """Return the network's inputs by name, each (B, O, L)."""
        rest = self.max_length - self.encoder.specials(pair=True)
        joined = [
            self.encoder.join(article[: rest - len(option)], option)
            for article, options in inputs
            for option in options
        ]
        padded = self.encoder.inputs(joined)
        return {name: rows.view(len(inputs), -1, rows.shape[1]) for name, rows in padded.items()}

    def _label(self, row: Mapping[str, Any], split: Split) -> int:
        name, options = f"question {row[self.id_column]} ({split}_split)", row[self.options_column]
        if len(options) != len(self.class_names) or len(options) < 2:
            raise ValueError(
                f"{self.options_column} of {name} must be as many as those of the first question, and at least 2, got "
                f"{len(options)} and {len(self.class_names)}"
            )
        if split == "predict":
            return 0
        if row[self.answer_column] not in self.class_names:
            known = ", ".join(self.class_names)
            raise ValueError(f"{self.answer_column} of {name} must be one of {known}, got {row[self.answer_column]!r}")
        return self.class_names.index(row[self.answer_column])


def fill_in(question: str, option: str) -> str:
    """Return a question with an option in place of its blank, or behind it.

    Examples:
        >>> fill_in("The cat sat on the _ .", "mat"), fill_in("Who sat?", "The cat.")
        ('The cat sat on the mat .', 'Who sat? The cat.')
    """
    return question.replace("_", option) if "_" in question else f"{question} {option}"
