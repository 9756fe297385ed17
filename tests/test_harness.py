import functools

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.distributed import run_distributed
from tests.resume import BatchReporter, assert_resume_equals_uninterrupted, newest_checkpoint
from tests.toy_resume import ToyData, ToyModule

STEPS = {"every_n_train_steps": 2, "save_top_k": -1}  # in mid-epoch: an epoch has 5 batches
EPOCH = {"save_on_train_epoch_end": True}
VALIDATION = {"save_on_train_epoch_end": False, "every_n_epochs": 1}


def toy_train(folder, ckpt_path, on_batch, checkpoint, trainer=None, data=None):
    module = ToyModule()
    arguments = {"max_epochs": 4, **(trainer or {})}
    Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, **checkpoint), BatchReporter(on_batch)],
        **arguments,
    ).fit(module, datamodule=ToyData(**(data or {})), ckpt_path=ckpt_path, weights_only=True)
    return module.state_dict()


@pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 20}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("checkpoint", "kill_at", "spared"),
    [
        (STEPS, 8, 6),  # in mid-epoch
        (STEPS, 11, 10),  # at an epoch's end, whose last batch wrote the checkpoint
        (EPOCH, 6, 5),  # at an epoch's end
        (EPOCH, 13, 10),  # in mid-epoch, thrown back to the epoch's end
        (VALIDATION, 11, 10),
    ],
    ids=["step-mid", "step-end", "epoch-end", "epoch-mid", "validation-end"],
)
def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path, length, checkpoint, kill_at, spared):
    train = functools.partial(toy_train, checkpoint=checkpoint, trainer=length)
    assert assert_resume_equals_uninterrupted(train, tmp_path, kill_at) == spared


def test_a_killed_run_resumes_with_gradients_accumulated_over_two_batches(tmp_path):
    train = functools.partial(toy_train, checkpoint=STEPS, trainer={"accumulate_grad_batches": 2})
    # Steps of the optimizer come after batches 2, 4, 5 (the epoch's last), 7, 9, 10, ...; every second one is saved.
    assert assert_resume_equals_uninterrupted(train, tmp_path, kill_at=9) == 7


@pytest.mark.parametrize("persistent", [False, True])
def test_a_killed_run_resumes_with_worker_processes(tmp_path, persistent):
    data = {"num_workers": 2, "persistent_workers": persistent}
    train = functools.partial(toy_train, checkpoint=STEPS, trainer={"max_epochs": 3}, data=data)
    assert assert_resume_equals_uninterrupted(train, tmp_path, kill_at=8) == 6


def test_the_helper_notices_another_order_after_the_resume(tmp_path):
    def train(folder, ckpt_path, on_batch):
        return toy_train(folder, ckpt_path, on_batch, EPOCH, data={"seed": 0 if ckpt_path is None else 1})

    with pytest.raises(AssertionError, match="the resumed run saw other samples"):
        assert_resume_equals_uninterrupted(train, tmp_path, kill_at=8)


def test_the_helper_notices_weights_that_were_not_restored(tmp_path):
    def train(folder, ckpt_path, on_batch):
        weights = toy_train(folder, ckpt_path, on_batch, EPOCH)
        return {name: value + 1e-5 * (ckpt_path is not None) for name, value in weights.items()}

    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_resume_equals_uninterrupted(train, tmp_path, kill_at=8)


def test_the_helper_shows_what_went_wrong_in_a_run(tmp_path):
    def train(folder, ckpt_path, on_batch):
        raise RuntimeError("no such luck")

    with pytest.raises(AssertionError, match="no such luck"):
        assert_resume_equals_uninterrupted(train, tmp_path, kill_at=1)


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    for step, name in enumerate(("b.ckpt", "deeper/a.ckpt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"global_step": step}, tmp_path / name)
    assert newest_checkpoint(tmp_path).name == "a.ckpt"


def sum_over_ranks(offset):
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return {"rank": dist.get_rank(), "sum": value}


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("rank one disagrees")


def test_run_distributed_returns_what_each_rank_returns():
    assert run_distributed(sum_over_ranks, 10) == [{"rank": 0, "sum": 21.0}, {"rank": 1, "sum": 21.0}]


def test_run_distributed_shows_a_rank_s_exception():
    with pytest.raises(Exception, match="rank one disagrees"):
        run_distributed(fail_on_rank_one)
