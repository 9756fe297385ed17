"""Show that a run that is killed and resumed equals one that is left alone.

The run under test is a function ``train(folder, ckpt_path, on_batch)`` that

- writes its checkpoints (``*.ckpt``) anywhere under ``folder``,
- resumes from ``ckpt_path`` where that is not None,
- calls ``on_batch(samples)`` once for every training batch, with what tells its samples apart: row numbers or a hash,
- returns the final weights, a dictionary of tensors.

:class:`BatchReporter` makes the calls from a Trainer, and needs no more than to be among its callbacks::

    def train(folder, ckpt_path, on_batch):
        module = ToyModule()
        callbacks = [ModelCheckpoint(every_n_train_steps=2), BatchReporter(on_batch)]
        trainer = Trainer(default_root_dir=folder, max_steps=20, callbacks=callbacks)
        trainer.fit(module, datamodule=ToyData(), ckpt_path=ckpt_path)
        return module.state_dict()

    assert_resume_equals_uninterrupted(train, tmp_path, kill_at=7)  # with 5 batches an epoch: in the second

The run dies while ``on_batch`` is called for the ``kill_at``-th time (from 1). So for a death at the end of an epoch
of n batches, pass n + 1: what counts then is the checkpoint that the epoch's end wrote.

Each run is a forked child with one thread: the kill harms nobody, and nothing is imported again.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

OnBatch = Callable[[Any], None]
Train = Callable[[Path, str | None, OnBatch], dict[str, Tensor]]


def fingerprint(batch: Any) -> str:
    """Return a hash of all tensors of a batch, augmentation included."""
    tensors = [leaf.detach().cpu().contiguous() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


class BatchReporter(Callback):
    """Tell ``on_batch`` of every training batch.

    Args:
        on_batch: What the train function was given.
        samples: Maps a batch to what tells its samples apart, as numbers, strings or lists of them.
    """

    def __init__(self, on_batch: OnBatch, samples: Callable[[Any], Any] = fingerprint) -> None:
        self.on_batch = on_batch
        self.samples = samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.on_batch(self.samples(batch))


def _child(train: Train, folder: Path, log: Path, ckpt_path: str | None, kill_at: int | None) -> None:
    torch.set_num_threads(1)
    # Lightning warns of what every resumed run does, in its old folder and in a new one; warnings fail the tests.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    count = 0
    with log.open("w") as file:

        def on_batch(samples: Any) -> None:
            nonlocal count
            count += 1
            print(json.dumps(samples), file=file, flush=True)
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            torch.save(train(folder, ckpt_path, on_batch), log.with_suffix(".pt"))
        except BaseException:
            log.with_suffix(".error").write_text(traceback.format_exc())
            os._exit(1)
    os._exit(0)  # not pytest's exit handlers


def _run(train: Train, folder: Path, log: Path, ckpt_path: str | None = None, kill_at: int | None = None) -> list[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(train, folder, log, ckpt_path, kill_at))
    process.start()
    process.join()
    error = log.with_suffix(".error")
    assert not error.exists(), error.read_text()
    expected = 0 if kill_at is None else -signal.SIGKILL
    assert process.exitcode == expected, f"the run ended with exit code {process.exitcode} instead of {expected}"
    return [json.loads(line) for line in log.read_text().splitlines()]


def newest_checkpoint(folder: Path) -> Path:
    """Return the checkpoint under ``folder`` that was written last."""

    def age(path: Path) -> tuple[int, int]:
        # A toy run writes several within one tick of the file system's clock, so the time alone does not order them.
        steps = torch.load(path, weights_only=True, mmap=True)["global_step"]
        return steps, path.stat().st_mtime_ns

    return max(folder.rglob("*.ckpt"), key=age)


def assert_resume_equals_uninterrupted(train: Train, folder: Path, kill_at: int, atol: float = 1e-6) -> int:
    """Compare the batches and the final weights of a killed and resumed run with those of an uninterrupted one.

    Args:
        train: The run; see above.
        folder: Empty folder for the runs.
        kill_at: Batch at whose start the run is killed with SIGKILL, counted from 1.
        atol: How far the weights may differ.

    Returns:
        The number of batches that the checkpoint spared the resumed run, for further assertions.
    """
    expected = _run(train, folder / "uninterrupted", folder / "uninterrupted.log")
    assert len(expected) > kill_at, f"the run has only {len(expected)} batches and cannot be killed at {kill_at}"
    before = _run(train, folder / "killed", folder / "killed.log", kill_at=kill_at)
    assert before == expected[:kill_at], "a second run saw other samples, even before it was killed"
    checkpoint = newest_checkpoint(folder / "killed")
    after = _run(train, folder / "killed", folder / "resumed.log", ckpt_path=str(checkpoint))
    spared = len(expected) - len(after)
    assert 0 < spared < kill_at, f"resumed after {spared} batches from {checkpoint.name}, killed at {kill_at}"
    assert after == expected[spared:], f"after {spared} batches the resumed run saw other samples"
    left, right = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("uninterrupted", "resumed"))
    torch.testing.assert_close(right, left, rtol=0, atol=atol)
    return spared
