import io
import itertools
import json

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import RandomSampler

from lightning_iclr.sampling import EpochSampler, ResumableLoader, SampleKey, sample_generator
from tests.resume import newest_checkpoint
from tests.toy_resume import ToyData, ToyDataset, ToyModule

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def keys_of(size, epoch=0, **arguments):
    sampler = EpochSampler(size, **arguments)
    sampler.set_epoch(epoch)
    return list(sampler)


def rows(loader):
    return [keys[:, 0].tolist() for _, keys in loader]


def chunks(keys, size):
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def test_the_order_depends_on_seed_and_epoch_alone():
    first = keys_of(50, epoch=3, shuffle=True, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert keys_of(50, epoch=3, shuffle=True, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(key.index for key in first) == list(range(50))
    assert {key.epoch for key in first} == {3}
    orders = {tuple(k.index for k in keys_of(50, e, shuffle=True, seed=s)) for s in range(10) for e in range(10)}
    assert len(orders) == 100  # seed 0 in epoch 1 is not seed 1 in epoch 0


def test_every_row_comes_first_equally_often():
    size, epochs = 5, 2000
    counts = [0] * size
    for epoch in range(epochs):
        counts[keys_of(size, epoch, shuffle=True)[0].index] += 1
    chi_square = sum((count - epochs / size) ** 2 / (epochs / size) for count in counts)
    assert chi_square < 23.5  # probability 1e-4 with 4 degrees of freedom


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_ranks_together_see_step_by_step_what_one_process_sees(shuffle, drop_last):
    for size, world, batch in itertools.product([12, 13, 17, 24], [2, 3], [1, 2, 3]):
        arguments = {"shuffle": shuffle, "seed": 4, "drop_last": drop_last}
        ranks = [chunks(keys_of(size, 1, num_replicas=world, rank=rank, **arguments), batch) for rank in range(world)]
        single = chunks(keys_of(size, 1, **arguments), world * batch)
        assert len({len(steps) for steps in ranks}) == 1
        for step, expected in enumerate(single):
            if step < len(ranks[0]):
                together = [key for rank in ranks for key in rank[step]]
                extra = len(together) - len(expected)
                if not drop_last:
                    assert 0 <= extra < world
                    assert extra == 0 or step == len(single) - 1
                    assert set(expected) <= set(together)
                elif len(expected) == world * batch:  # what a loader with drop_last gives out
                    assert sorted(together) == sorted(expected)


@pytest.mark.parametrize("size", [1, 5, 7, 8, 9])
def test_evaluation_counts_every_row_once_and_marks_the_rest(size):
    ranks = [keys_of(size, num_replicas=4, rank=rank) for rank in range(4)]
    assert {len(keys) for keys in ranks} == {-(-size // 4)}
    keys = [key for rank in ranks for key in rank]
    assert sorted(key.index for key in keys if not key.padding) == list(range(size))
    assert sum(key.padding for key in keys) == -size % 4


def test_training_wraps_the_order_s_start_around_or_drops_its_tail():
    order = [key.index for key in keys_of(7, shuffle=True)]
    wrapped = [key for rank in range(3) for key in keys_of(7, shuffle=True, num_replicas=3, rank=rank)]
    assert sorted(key.index for key in wrapped) == sorted([*range(7), *order[:2]])
    assert not any(key.padding for key in wrapped)
    dropped = [keys_of(7, shuffle=True, drop_last=True, num_replicas=3, rank=rank) for rank in range(3)]
    assert sorted(key.index for rank in dropped for key in rank) == sorted(order[:6])


def test_neighbouring_samples_draw_unrelated_numbers():
    draws = torch.stack(
        [
            torch.randn(32, generator=sample_generator(seed, epoch, index))
            for seed in range(8)
            for epoch in range(8)
            for index in range(8)
        ]
    ).double()
    # Under independence a correlation over m numbers has deviation 1 / sqrt(m).
    draws = draws.view(8, 8, 8, 32)
    for dim in range(3):
        near, far = draws.narrow(dim, 0, 7).flatten(), draws.narrow(dim, 1, 7).flatten()
        assert abs(torch.corrcoef(torch.stack([near, far]))[0, 1]) < 4 / near.numel() ** 0.5
    assert abs(draws.mean()) < 4 / draws.numel() ** 0.5
    first = draws[..., 0].flatten()
    assert len(first.unique()) == 512
    assert torch.rand(1, generator=sample_generator(1, 2, 3)) != torch.rand(1, generator=sample_generator(3, 2, 1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_s_state_counts_the_batches_handed_out_and_not_those_fetched_ahead(num_workers):
    def build():
        loader = ResumableLoader(ToyDataset(18), batch_size=4, shuffle=True, seed=2, num_workers=num_workers)
        loader.sampler.set_epoch(6)
        return loader

    expected, loader = rows(build()), build()
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert (state["epoch"], state["batches"]) == (6, 2)

    resumed = ResumableLoader(ToyDataset(18), batch_size=4, shuffle=True, seed=2, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert len(resumed) == 5
    assert rows(resumed) == expected[2:]
    assert rows(resumed) == expected  # only the first iteration is shortened


def test_a_saved_place_is_forgotten_in_another_epoch():
    loader = ResumableLoader(ToyDataset(8), batch_size=4, shuffle=True)
    loader.load_state_dict({**loader.state_dict(), "batches": 1})
    loader.sampler.set_epoch(1)
    assert len(rows(loader)) == 2
    loader.sampler.set_epoch(0)
    assert len(rows(loader)) == 2


def test_an_epoch_set_after_iter_counts():
    # Lightning calls iter() before set_epoch() at the start of a run.
    loader = ResumableLoader(ToyDataset(8), batch_size=8, shuffle=True, num_workers=1)
    batches = iter(loader)
    loader.sampler.set_epoch(2)
    assert next(batches)[1][:, 1].tolist() == [2] * 8


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("global_batch_size", {"batch_size": 2}),
        ("dataset_size", {"dataset": ToyDataset(16)}),
        ("seed", {"seed": 1}),
        ("shuffle", {"shuffle": False}),
    ],
)
def test_a_resume_in_mid_epoch_refuses_other_data(name, change):
    arguments = {"dataset": ToyDataset(12), "batch_size": 4, "shuffle": True}
    state = {**ResumableLoader(**arguments).state_dict(), "batches": 1}
    loader = ResumableLoader(**{**arguments, **change})
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match=f"resumed in mid-epoch with its own {name}, got"):
        rows(loader)
    loader.load_state_dict({**state, "batches": 0})
    assert rows(loader)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="dataset must hold at least one sample, got 0"):
        ResumableLoader(ToyDataset(0))
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        ResumableLoader(ToyDataset(3), batch_size=0)
    with pytest.raises(ValueError, match="batch_size must not exceed a process's 3 samples with drop_last, got 4"):
        ResumableLoader(ToyDataset(3), batch_size=4, drop_last=True)
    with pytest.raises(TypeError, match="sampler must be an EpochSampler, got RandomSampler"):
        ResumableLoader(ToyDataset(3), sampler=RandomSampler(ToyDataset(3)))
    with pytest.raises(TypeError, match="dataset must have a length, got generator"):
        ResumableLoader(x for x in range(3))
    with pytest.raises(ValueError, match="rank must lie between 0 and num_replicas - 1, got 2 of 2"):
        EpochSampler(3, num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="num_replicas and rank must be given together, got 2 and None"):
        EpochSampler(3, num_replicas=2)


def test_lightning_sets_the_epoch():
    module = ToyModule()
    Trainer(**QUIET, max_epochs=3, enable_checkpointing=False).fit(module, datamodule=ToyData())
    assert [batch[0][1] for batch in module.seen] == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize("in_a_hook", [True, False])
def test_predict_rebuilds_the_loader(in_a_hook):
    data = ToyData()
    trainer = Trainer(**QUIET)
    given = {"datamodule": data} if in_a_hook else {"dataloaders": data.val_dataloader()}
    predictions = torch.cat(trainer.predict(ToyModule(), **given))
    assert predictions[:, 0].tolist() == list(range(7))
    assert isinstance(trainer.predict_dataloaders, ResumableLoader)


def test_overfitting_repeats_the_first_batches():
    module = ToyModule()
    trainer = Trainer(**QUIET, max_epochs=2, overfit_batches=2, enable_checkpointing=False, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="You requested to overfit"):
        trainer.fit(module, datamodule=ToyData())
    assert [[row for row, *_ in batch] for batch in module.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


class FailingModule(ToyModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if len(self.seen) == 8:
            raise RuntimeError("out of memory")
        return loss


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_written_by_a_failing_step_repeats_its_batch(tmp_path):
    def trainer():
        return Trainer(**QUIET, max_epochs=3, callbacks=[ModelCheckpoint(tmp_path, save_on_exception=True)])

    whole, failed, resumed = ToyModule(), FailingModule(), ToyModule()
    Trainer(**QUIET, max_epochs=3, enable_checkpointing=False).fit(whole, datamodule=ToyData())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer().fit(failed, datamodule=ToyData())
    path = newest_checkpoint(tmp_path)
    trainer().fit(resumed, datamodule=ToyData(), ckpt_path=path, weights_only=True)
    assert resumed.seen == whole.seen[7:]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("length", [{"max_epochs": 5}, {"max_epochs": -1, "max_steps": 25}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    "cuts", [("step=5", "step=8"), ("step=5", "epoch=1"), ("step=8", "epoch=1"), ("epoch=0", "step=10")]
)
def test_a_run_that_is_resumed_twice_sees_the_same_order(tmp_path, length, cuts):
    def fit(name, ckpt_path=None):
        module = ToyModule()
        steps = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, filename="{step}", save_top_k=-1)
        epochs = ModelCheckpoint(tmp_path / name, save_on_train_epoch_end=True, filename="{epoch}", save_top_k=-1)
        trainer = Trainer(**QUIET, callbacks=[steps, epochs], **length)
        trainer.fit(module, datamodule=ToyData(), ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
        return module

    whole = fit("whole")
    assert fit("once", tmp_path / "whole" / f"{cuts[0]}.ckpt").seen[-10:] == whole.seen[-10:]
    twice = fit("twice", tmp_path / "once" / f"{cuts[1]}.ckpt")
    assert twice.seen == whole.seen[{"step=8": 8}.get(cuts[1], 10) :]
    torch.testing.assert_close(twice.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)
    for module in (twice, whole):  # what loggers and callbacks go by
        assert (module.trainer.global_step, module.trainer.current_epoch) == (25, 5)
        assert module.trainer.fit_loop.epoch_loop._batches_that_stepped == 25


class RecordingModule(ToyModule):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.evaluated = []

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch[1].tolist()

    def on_train_end(self):
        record = {"seen": self.seen, "evaluated": self.evaluated}
        (self.folder / f"{self.trainer.world_size}-{self.trainer.global_rank}.json").write_text(json.dumps(record))


def test_two_processes_train_to_the_weights_of_one_with_the_doubled_batch(tmp_path):
    def fit(batch_size, **processes):
        module = RecordingModule(tmp_path)
        trainer = Trainer(**QUIET, **processes, max_epochs=3, enable_checkpointing=False, num_sanity_val_steps=0)
        # 22 rows: drop_last leaves off 2, others in each epoch; 5 steps an epoch
        trainer.fit(module, datamodule=ToyData(22, batch_size, drop_last=True))
        return module.state_dict()

    two, one = fit(2, devices=2, strategy="ddp_fork"), fit(4, devices=1)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
    left, right, single = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("2-0", "2-1", "1-0"))
    assert len(single["seen"]) == 15
    for a, b, expected in zip(left["seen"], right["seen"], single["seen"], strict=True):
        assert sorted(a + b) == sorted(expected)
    counted = [SampleKey(*key) for key in left["evaluated"] + right["evaluated"] if not key[2]]
    assert sorted(key.index for key in counted) == sorted(list(range(7)) * 3)


def resume_in_two_processes(folder, name, ckpt_path=None):
    module = RecordingModule(folder / name)
    (folder / name).mkdir()
    trainer = Trainer(
        **QUIET,
        devices=2,
        strategy="ddp_fork",
        max_epochs=-1,
        max_steps=12,
        callbacks=[ModelCheckpoint(folder / name, every_n_train_steps=1, filename="{step}", save_top_k=-1)],
    )
    trainer.fit(module, datamodule=ToyData(20, 2), ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
    seen = [json.loads((folder / name / f"2-{rank}.json").read_text())["seen"] for rank in range(2)]
    return seen, module.state_dict()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_two_processes_resume_in_mid_epoch(tmp_path):
    seen, weights = resume_in_two_processes(tmp_path, "whole")
    again, resumed = resume_in_two_processes(tmp_path, "resumed", tmp_path / "whole" / "step=7.ckpt")
    assert again == [rank[7:] for rank in seen]
    torch.testing.assert_close(resumed, weights, rtol=0, atol=1e-6)


def test_predictions_of_two_processes_cover_every_row_once(tmp_path):
    class Writer(ToyModule):
        def predict_step(self, batch, batch_idx):
            name = f"{self.global_rank}-{batch_idx}.json"
            (tmp_path / name).write_text(json.dumps(batch[1].tolist()))
            return batch[1]

    Trainer(**QUIET, devices=2, strategy="ddp_fork").predict(Writer(), datamodule=ToyData(), return_predictions=False)
    keys = [SampleKey(*key) for path in tmp_path.glob("*.json") for key in json.loads(path.read_text())]
    assert sorted(key.index for key in keys if not key.padding) == list(range(7))
    assert len(keys) == 8
