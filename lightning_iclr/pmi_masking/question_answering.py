"""SQuAD 2.0, the first of the paper's evaluations: the answer to a question is a span of a text, or there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_iclr.pmi_masking.finetuning import FineTuning, Gathered
from lightning_iclr.pmi_masking.finetuning import Split as Evaluated
from lightning_iclr.pmi_masking.finetuning_data import FineTuningDataModule, Split
from lightning_iclr.pmi_masking.squad_features import Question, SpanBatch, SpanFeatures, Window, answers, best_spans
from lightning_iclr.pmi_masking.squad_scores import summarize
from lightning_iclr.tables import DataFiles

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetDict


class SpanQuestionAnswering(FineTuning):
    """Find the answer to a question in a text, or that there is none (SQuAD 2.0).

    The loss is the mean of the cross entropies of the answer's first and last token; a window without the answer has
    both at ``[CLS]``. A question's answer is the best span of all its windows; none is given where the null score, the
    least of its windows', exceeds the answer's by more than ``null_threshold``. Scores are those of SQuAD's evaluation:
    ``val/exact`` and ``val/f1`` over all questions, those with an answer (``_has_answer``) and those without
    (``_no_answer``); ``val/best_f1`` is what the best threshold reaches, ``val/best_f1_threshold``. ``val/score`` is
    ``val/f1``.

    Batches are `SpanBatch`, and their loader's data set has ``questions``, as `SpanFeatures` has.

    Args:
        net: A network of ``transformers`` with the task's head, or any that returns what such a one does; the settings
            of one from scratch, with ``model_type``; the name or folder of a pretrained one, such as
            `MaskedLM.save_pretrained` writes; or a checkpoint (``.ckpt``) of a `MaskedLM` that a recipe trained.
        optimizer: Builds the optimizer from parameter groups; weight decay does not reach biases and norms, as in BERT.
        lr_scheduler: Builds the schedule from the optimizer; ``None`` takes BERT's, up and down in straight lines.
        warmup: Share of the steps on the way up, without an ``lr_scheduler``.
        null_threshold: By how much no answer must be above the answer to be given; ``None`` takes what is best for F1
            on the validation data, when last validated, for test and prediction, too.
        max_answer_length: Tokens of an answer, at most.
        seed: Seed of dropout.
        compile: Compile the network in place with ``torch.compile``.

    Raises:
        ValueError: ``max_answer_length`` is below 1, or what `FineTuning` raises.

    Examples:
        >>> small = {"model_type": "bert", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1}
        >>> module = SpanQuestionAnswering({**small, "num_attention_heads": 2, "intermediate_size": 16})
        >>> module(input_ids=torch.ones(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 2])
    """

    head = "AutoModelForQuestionAnswering"
    found_threshold: Tensor

    def __init__(
        self,
        net: nn.Module | dict[str, Any] | str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.1,
        null_threshold: float | None = 0.0,
        max_answer_length: int = 30,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        if max_answer_length < 1:
            raise ValueError(f"max_answer_length must be at least 1, got {max_answer_length}")
        super().__init__(net, optimizer, lr_scheduler, warmup, seed, compile)
        self.null_threshold, self.max_answer_length = null_threshold, max_answer_length
        self.register_buffer("found_threshold", torch.zeros(()))

    @property
    def threshold(self) -> float:
        """Odds above which no answer is given."""
        return float(self.found_threshold) if self.null_threshold is None else self.null_threshold

    def forward(self, **inputs: Tensor) -> Tensor:
        """Map tokens (B, L) to start and end logits (B, L, 2)."""
        out = self.run_net(inputs)
        return torch.stack([out.start_logits, out.end_logits], dim=-1)

    def loss(self, logits: Tensor, batch: SpanBatch) -> Tensor:
        return F.cross_entropy(logits.float(), batch.positions, reduction="none").mean(dim=1)

    def results(self, logits: Tensor, batch: SpanBatch) -> Tensor:
        return best_spans(logits, batch, self.max_answer_length)

    def scores(self, results: Tensor, split: Evaluated) -> dict[str, float]:
        loader: Any = self.trainer.val_dataloaders if split == "val" else self.trainer.test_dataloaders
        rows, texts, odds = answers(results.cpu(), loader.dataset.questions)
        questions = [loader.dataset.questions[row] for row in rows]
        chosen = None if split == "val" and self.null_threshold is None else self.threshold
        found = summarize(texts, odds, questions, chosen)
        if chosen is None:
            self.found_threshold.fill_(found["threshold"])
        return found

    def predict_step(self, batch: SpanBatch, batch_idx: int) -> Tensor:
        """Return the best answer of each window, see `best_spans`."""
        return self.results(self(**batch.inputs), batch)


class AnswerWriter(Callback):
    """Write what ``predict`` finds as SQuAD's evaluation reads it, into the run folder.

    ``predictions.json`` has the text by the question's id, empty for no answer; ``null_odds.json`` by how much the null
    score is above the answer's, for ``--na-prob-file``. For `SpanQuestionAnswering`, on any number of processes.
    """

    def __init__(self) -> None:
        self._spans = Gathered()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spans.reset()
        self._spans.to(pl_module.device)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._spans.update(outputs)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        spans = self._spans.compute()
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # agreed on between the ranks: read it on each
        if not trainer.is_global_zero:
            return
        loader: Any = trainer.predict_dataloaders
        questions = loader.dataset.questions
        rows, texts, odds = answers(spans[spans[:, 0] >= 0].cpu(), questions)
        module: Any = pl_module
        ids = [questions[row].id for row in rows]
        given = ["" if odd > module.threshold else text for text, odd in zip(texts, odds.tolist(), strict=True)]
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in (("predictions", given), ("null_odds", odds.tolist())):
            content = json.dumps(dict(zip(ids, values, strict=True)), ensure_ascii=False, indent=1)
            (folder / f"{name}.json").write_text(content, encoding="utf-8")
        rank_zero_info(f"answers to {len(rows)} questions are in {folder / 'predictions.json'}")


class QuestionAnsweringDataModule(FineTuningDataModule):
    """Serve questions about texts in the columns of ``rajpurkar/squad_v2``, as windows over the texts.

    ``answers`` holds ``text`` and ``answer_start`` of each right answer, and nothing where there is none. Training goes
    by the first.

    Args:
        dataset: Hub id, folder, file, or, in Python, a ``Dataset`` or ``DatasetDict``.
        tokenizer: Name or folder of the network's tokenizer, a ``tokenizer.json``, ``embedded`` or, in Python, a fast
            tokenizer of ``transformers``.
        config_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        train_split: Training part, with slices and sums.
        val_split: Validation part, likewise.
        test_split: Test part, likewise; ``None`` for none.
        predict_split: Part to predict, whose answers are not read; ``None`` takes the test or else validation part.
        id_column: Column of the questions' names.
        question_column: Column of the questions.
        context_column: Column of the texts.
        answers_column: Column of the answers.
        max_length: Tokens of a window with its question, special ones included.
        document_stride: Tokens between the beginnings of windows.
        max_query_length: Tokens of a question, which is cut there.
        batch_size: Windows that one process takes at a step.
        eval_batch_size: The same in evaluation.
        seed: Seed of the orders.
        num_workers: Processes that load.

    Raises:
        ValueError: A number is outside its range. In `setup`: a column is missing, an answer is not where it is said to
            be, or ``max_length`` is too small for the stride.
    """

    def __init__(
        self,
        dataset: str | Table | DatasetDict = "rajpurkar/squad_v2",
        *,
        tokenizer: Any,
        config_name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        predict_split: str | None = None,
        id_column: str = "id",
        question_column: str = "question",
        context_column: str = "context",
        answers_column: str = "answers",
        max_length: int = 512,
        document_stride: int = 128,
        max_query_length: int = 64,
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
        for name, number in (("document_stride", document_stride), ("max_query_length", max_query_length)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.id_column, self.question_column = id_column, question_column
        self.context_column, self.answers_column = context_column, answers_column
        self.document_stride, self.max_query_length = document_stride, max_query_length

    def columns(self, split: Split) -> Mapping[str, str]:
        names = ["id_column", "question_column", "context_column", *([] if split == "predict" else ["answers_column"])]
        return {name: getattr(self, name) for name in names}

    def features(self, table: Table, split: Split) -> SpanFeatures:
        wanted = list(self.columns(split).values())
        questions = [self._question(row, split) for row in table.select_columns(wanted)]
        return SpanFeatures(questions, self.encoder, self.max_length, self.document_stride, self.max_query_length)

    def collate(self, samples: Sequence[Window]) -> SpanBatch:
        rows: SpanFeatures = next(iter(self.rows.values()))
        return rows.collate(samples)

    def _question(self, row: Mapping[str, Any], split: Split) -> Question:
        name, context = str(row[self.id_column]), row[self.context_column]
        found = row[self.answers_column] if split != "predict" else {"text": [], "answer_start": []}
        texts, begins = found["text"], found["answer_start"]
        if texts and context[begins[0] : begins[0] + len(texts[0])] != texts[0]:
            raise ValueError(
                f"{self.answers_column} of question {name} ({split}_split) must be in the text where answer_start "
                f"says, got {texts[0]!r} at {begins[0]}"
            )
        return Question(name, row[self.question_column], context, tuple(texts), begins[0] if texts else -1)
