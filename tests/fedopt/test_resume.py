import csv

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_iclr.fedopt.compression import TopK
from lightning_iclr.fedopt.optim import FedYogi
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.fedopt.federation import Module, Tied, Validated, loader, plain_loop, rows, trainer
from tests.resume import BatchReporter, assert_resume_equals_uninterrupted

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def yogi(params):
    return FedYogi(params, lr=0.05)


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def run(every, module=None, rounds=6, **options):
    def train(folder, ckpt_path, on_batch):
        strategy = FedOptStrategy(yogi, schedule, **options)
        callbacks = [ModelCheckpoint(dirpath=folder, save_top_k=-1, **every), BatchReporter(on_batch)]
        own = module() if module is not None else Module()
        data = loader(local_epochs=2)
        validation = [DataLoader(rows(), batch_size=8)] if isinstance(own, Validated) else []
        trainer(strategy, rounds, enable_checkpointing=True, callbacks=callbacks).fit(
            own, data, *validation, ckpt_path=ckpt_path
        )
        return {**own.state_dict(), **{k: torch.tensor(float(v)) for k, v in strategy.round_metrics.items()}}

    return train


BATCHES = [sum(task.steps for task in loader(local_epochs=2).plan(index).tasks[0]) for index in range(6)]


@pytest.mark.parametrize(
    "options", [{}, {"personal": ["net.4.*"]}, {"compression": TopK(0.3)}], ids=["plain", "personal", "top-k"]
)
def test_a_run_killed_at_a_rounds_end_resumes_exactly(tmp_path, options):
    spared = assert_resume_equals_uninterrupted(
        run({"every_n_epochs": 1, "save_on_train_epoch_end": True}, **options),
        tmp_path,
        kill_at=sum(BATCHES[:3]) + 1,
        atol=0,
    )
    assert spared == sum(BATCHES[:3])


@pytest.mark.parametrize(
    "module", [Module, lambda: Module("step"), Tied], ids=["schedule of rounds", "schedule of steps", "tied"]
)
def test_a_run_killed_inside_a_round_repeats_the_round(tmp_path, module):
    kill_at = sum(BATCHES[:3]) + 5
    spared = assert_resume_equals_uninterrupted(
        run({"every_n_train_steps": 1}, module=module), tmp_path, kill_at=kill_at, atol=0
    )
    assert spared == sum(BATCHES[:3])


def test_a_checkpoint_of_the_validation_resumes_exactly(tmp_path):
    spared = assert_resume_equals_uninterrupted(
        run({"monitor": "val/loss"}, module=Validated), tmp_path, kill_at=sum(BATCHES[:4]) + 2, atol=0
    )
    assert spared == sum(BATCHES[:4])


@pytest.mark.parametrize("every", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}], ids=["inside", "end"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_resumes_on_another_number_of_processes(tmp_path, every):
    data, module = loader(shuffle=False), Module()
    expected = plain_loop(module, data, yogi, rounds=4)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True, **every)
    two = trainer(
        FedOptStrategy(yogi, start_method="fork"), 2, devices=2, enable_checkpointing=True, callbacks=[checkpoint]
    )
    two.fit(module, data)
    again = Module()
    trainer(FedOptStrategy(yogi), 4).fit(again, loader(shuffle=False), ckpt_path=str(tmp_path / "last.ckpt"))
    torch.testing.assert_close(dict(again.state_dict()), dict(expected), rtol=0, atol=1e-6)


class Save(Callback):
    """Saves a checkpoint after one batch of a round, or after its last, and keeps what the module held then."""

    def __init__(self, path, round_index, batch):
        self.path, self.round_index, self.batch = path, round_index, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if trainer.current_epoch == self.round_index and (is_last if self.batch == "last" else batch_idx == self.batch):
            trainer.save_checkpoint(self.path)
            self.held = {name: value.clone() for name, value in pl_module.state_dict().items()}


@pytest.mark.parametrize(
    ("build", "personal", "own"),
    [
        (Module, [], []),
        (Module, ["net.4.*"], ["net.4.weight", "net.4.bias"]),
        (Tied, [], []),
        (Tied, ["alias.4.*"], ["net.4.weight", "net.4.bias", "alias.4.weight", "alias.4.bias"]),
    ],
    ids=["plain", "personal", "tied", "tied-and-personal"],
)
def test_a_checkpoint_inside_a_round_holds_the_weights_of_the_rounds_start(tmp_path, build, personal, own):
    data = loader(shuffle=False)
    # In the first round each client starts from the server's values of what is personal, and nobody changes those.
    expected = {**plain_loop(build(), data, yogi, rounds=1), **{name: build().state_dict()[name] for name in own}}
    inside = Save(tmp_path / "inside.ckpt", round_index=1, batch=2)
    trainer(FedOptStrategy(yogi, personal=personal), 2, callbacks=[inside]).fit(build(), data)
    saved = torch.load(inside.path, weights_only=True)
    torch.testing.assert_close(saved["state_dict"], dict(expected), rtol=0, atol=1e-6)
    moved = {name for name, value in saved["state_dict"].items() if not torch.equal(value, inside.held[name])}
    assert moved == {name for name in expected if not torch.equal(inside.held[name], expected[name])} >= set(own)
    steps = sum(task.steps for task in data.plan(0).tasks[0])
    assert (saved["fedopt"]["round"], saved["global_step"], saved["epoch"]) == (1, steps, 1)
    assert all(not state["state"] for state in saved["optimizer_states"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("round_index", "batch"), [(2, 2), (1, "last")], ids=["inside", "end"])
def test_a_resumed_run_logs_at_the_steps_of_the_uninterrupted(tmp_path, round_index, batch, accumulate):
    def fit(name, callbacks=(), ckpt_path=None):
        logger = CSVLogger(tmp_path, name="", version=name)
        options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 1, "callbacks": [*callbacks]}
        federated = trainer(FedOptStrategy(yogi), 4, logger=logger, **options)
        federated.fit(Module(), loader(local_epochs=2), ckpt_path=ckpt_path)
        with (tmp_path / name / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    save = Save(tmp_path / "saved.ckpt", round_index, batch)
    rest = [row for row in fit("whole", [save]) if int(row["epoch"]) >= 2]
    assert int(rest[0]["step"]) == torch.load(save.path, weights_only=True)["global_step"] > 0
    assert fit("rest", ckpt_path=save.path) == rest


def test_a_checkpoint_of_a_centralised_run_is_refused(tmp_path):
    module = Module(norm=False)
    central = trainer("auto", 1)
    central.fit(module, DataLoader(rows(), batch_size=10))
    central.save_checkpoint(tmp_path / "central.ckpt")
    with pytest.raises(ValueError, match="ckpt_path is the checkpoint of a run without FedOptStrategy"):
        trainer(FedOptStrategy(yogi), 2).fit(Module(norm=False), loader(), ckpt_path=tmp_path / "central.ckpt")


def test_a_checkpoint_validates_under_the_default_strategy_and_with_weights_alone(tmp_path):
    module, federated = Validated(), trainer(FedOptStrategy(yogi), 2)
    federated.fit(module, loader(), DataLoader(rows(), batch_size=8))
    expected = federated.validate(module, DataLoader(rows(), batch_size=8), verbose=False)
    for weights_only in (False, True):
        federated.save_checkpoint(tmp_path / "final.ckpt", weights_only=weights_only)
        found = trainer("auto").validate(
            Validated(), DataLoader(rows(), batch_size=8), ckpt_path=tmp_path / "final.ckpt", verbose=False
        )
        assert found == expected
