"""Write what ``predict`` finds into the run folder, for any module and with each row identified."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

_Identity = Mapping[str, Sequence[Any]]


class PredictionWriter(Callback):
    """Write what ``predict`` finds to ``predictions.csv`` or ``predictions.npz`` in the run folder.

    What is written goes by what the module's ``predict_step`` returns for B rows:

    - numbers (B, K) of a module with an attribute ``num_classes`` are probabilities: ``label``, the likeliest class,
      and its ``probability``; with ``top_k`` above 1 ``label_1``, ``probability_1``, ``label_2``, ...;
    - other numbers (B,) or (B, D) are features: ``feature_0``, ``feature_1``, ...;
    - integers (B,) or (B, T), such as the tokens of a text, are a ``prediction``;
    - numbers of more dimensions, such as images (B, C, H, W), go to the ``.npz`` file, as its array ``prediction``.

    The columns, or arrays, before these identify the row. Rows are in the data's order, on any number of processes.

    A data module may have ``identify(rows)``, which returns these columns by name for rows (N,) that its prediction
    batches have as their last element (-1 for one that only fills up a batch), ``class_names``, and ``decode(tokens)``,
    which returns a text for each row of tokens (N, T). Without these, rows are counted, as ``row``, and classes and
    tokens are numbers.

    Args:
        top_k: Classes to write of each row, the likeliest first; all where there are fewer.
        all_probabilities: Whether to write each class's probability, too, in a column ``probability/<class>``.

    Raises:
        ValueError: ``top_k`` is below 1.
        TypeError: In prediction, ``predict_step`` returns something else than a tensor with one entry a row.

    Examples:
        >>> writer = PredictionWriter(top_k=5)
        >>> trainer = Trainer(callbacks=[writer], accelerator="cpu", logger=False)
    """

    def __init__(self, top_k: int = 1, all_probabilities: bool = False) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.top_k, self.all_probabilities = top_k, all_probabilities
        self._rows: list[Tensor] = []
        self._values: list[Tensor] = []
        self._num_classes = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows, self._values = [], []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, Tensor) or outputs.ndim == 0:
            raise TypeError(
                "PredictionWriter writes what predict_step returns, a tensor with one entry a row, got "
                f"{'a scalar' if isinstance(outputs, Tensor) else type(outputs).__name__}"
            )
        if hasattr(getattr(trainer, "datamodule", None), "identify"):
            rows = batch[-1]
        else:  # batches are dealt out to the processes in turn
            before = sum(map(len, self._rows))
            counted = torch.arange(before, before + len(outputs), device=outputs.device) * trainer.world_size
            rows = counted + trainer.global_rank
        self._rows.append(rows)
        values = outputs.float() if outputs.is_floating_point() else outputs
        self._values.append(self._likeliest(values) if _is_classifier(pl_module, values) else values)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows, values = torch.cat(self._rows), torch.cat(self._values)
        self._rows, self._values = [], []
        lacking = int(from_all_ranks(rows.new_tensor(len(rows))).max()) - len(rows)
        rows = torch.cat([rows, rows.new_full((lacking,), -1)])
        values = torch.cat([values, values.new_zeros(lacking, *values.shape[1:])])
        rows, values = (from_all_ranks(part).flatten(0, 1).cpu() for part in (rows, values))
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # agreed on between the ranks: read it on each
        if not trainer.is_global_zero:
            return
        order = rows.argsort()
        order = order[rows[order] >= 0]  # negative ones only fill up a process's last batch
        rows, values = rows[order], values[order]
        data: Any = getattr(trainer, "datamodule", None)
        identity: _Identity = data.identify(rows) if hasattr(data, "identify") else {"row": rows.tolist()}
        folder.mkdir(parents=True, exist_ok=True)
        if values.is_floating_point() and values.ndim > 2:
            path = folder / "predictions.npz"
            _write_arrays(path, {**identity, "prediction": values.numpy()})
        else:
            path = folder / "predictions.csv"
            if _is_classifier(pl_module, values):
                header, lines = self._classes(values, class_names(trainer, self._num_classes))
            else:
                header, lines = _columns(values, getattr(data, "decode", None))
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow([*identity, *header])
                writer.writerows(
                    [*own, *line] for own, line in zip(zip(*identity.values(), strict=True), lines, strict=True)
                )
        rank_zero_info(f"{len(rows)} predictions are in {path}")

    def _likeliest(self, probabilities: Tensor) -> Tensor:
        """Map probabilities (B, K) to the likeliest classes, their probabilities and, if wanted, all of them."""
        self._num_classes = probabilities.shape[1]
        highest, labels = probabilities.topk(min(self.top_k, self._num_classes), dim=1)
        parts = [labels.float(), highest, *([probabilities] if self.all_probabilities else [])]
        return torch.cat(parts, dim=1)

    def _classes(self, values: Tensor, names: Sequence[str]) -> tuple[list[str], Iterable[list[str]]]:
        written = min(self.top_k, len(names))
        places = [""] if written == 1 else [f"_{place}" for place in range(1, written + 1)]
        header = [f"{kind}{place}" for place in places for kind in ("label", "probability")]
        if self.all_probabilities:
            header += [f"probability/{name}" for name in names]

        def lines() -> Iterable[list[str]]:
            for row in values.tolist():
                labels, highest, rest = row[:written], row[written : 2 * written], row[2 * written :]
                pairs = zip(labels, highest, strict=True)
                yield [part for label, p in pairs for part in (names[int(label)], f"{p:.6g}")] + _digits(rest)

        return header, lines()


def _write_arrays(path: Path, columns: Mapping[str, Any]) -> None:
    # np.savez takes names as keywords, and has a keyword "file" itself.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(column), allow_pickle=False)


def class_names(trainer: Trainer, num_classes: int) -> list[str]:
    """Return the data module's names of the classes, or their numbers."""
    names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
    return list(names) if names and len(names) == num_classes else [str(label) for label in range(num_classes)]


def from_all_ranks(tensor: Tensor) -> Tensor:
    """Stack the tensors of all ranks, equal in shape, on a first dimension."""
    if not dist.is_available() or not dist.is_initialized():
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def _is_classifier(module: LightningModule, values: Tensor) -> bool:
    return hasattr(module, "num_classes") and values.is_floating_point() and values.ndim == 2


def _columns(values: Tensor, decode: Any) -> tuple[list[str], Iterable[list[str]]]:
    flat = values.reshape(len(values), -1)
    if values.is_floating_point():
        return [f"feature_{place}" for place in range(flat.shape[1])], map(_digits, flat.tolist())
    if decode is not None and values.ndim == 2:
        return ["prediction"], ([text] for text in decode(values))
    return ["prediction"], ([" ".join(map(str, row))] for row in flat.tolist())


def _digits(numbers: Iterable[float]) -> list[str]:
    return [f"{number:.6g}" for number in numbers]
