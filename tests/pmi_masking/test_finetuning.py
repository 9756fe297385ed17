import copy
import math

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from transformers import AutoModelForSequenceClassification, DistilBertConfig, RobertaConfig

from lightning_iclr.__main__ import main
from lightning_iclr.pmi_masking import (
    MaskedLM,
    MultipleChoice,
    SpanQuestionAnswering,
    TextClassification,
    TextClassificationDataModule,
    load_tokenizer,
)
from lightning_iclr.pmi_masking.finetuning import make_task_network
from tests.distributed import Ranks, run_distributed
from tests.pmi_masking.evaluation_toys import SMALL, glue_rows, quiet, write
from tests.resume import BatchReporter, assert_resume_equals_uninterrupted

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You are using `torch.load` with `weights_only=False`"),
]
MODULES = {
    SpanQuestionAnswering: {},
    MultipleChoice: {},
    TextClassification: {"task": "mnli"},
}
STRATEGIES = {"ddp": DDPStrategy, "fsdp": lambda: ModelParallelStrategy(save_distributed_checkpoint=False)}
HALVES = {"train_split": "train", "val_split": "train", "test_split": "train", "batch_size": 4}


def encoder(net):
    return {name: weight for name, weight in net.base_model.state_dict().items() if "pooler" not in name}


@pytest.mark.parametrize("kind", MODULES)
def test_what_a_masked_lm_saves_is_fine_tuned_from_equal_weights_with_dropout(kind, tmp_path):
    pretrained = MaskedLM({**SMALL, "hidden_dropout_prob": 0.1})
    pretrained.save_pretrained(tmp_path, load_tokenizer("embedded"))
    module = kind(str(tmp_path), **MODULES[kind])
    torch.testing.assert_close(encoder(module.net), encoder(pretrained.net), rtol=0, atol=0)
    assert all(part.training for part in module.net.modules())
    assert kind({**SMALL}, **MODULES[kind]).net.config.hidden_size == 16
    assert kind(module.net, **MODULES[kind]).net is module.net


@pytest.mark.slow
def test_a_checkpoint_of_a_masked_lm_recipe_is_fine_tuned():
    small = [
        "--data.train_split=train[:300]",
        "--data.val_split=validation[:64]",
        "--data.test_split=test[:64]",
        "--data.masking=random_token",
    ]
    sizes = ["hidden_size=16", "num_hidden_layers=1", "intermediate_size=16"]
    quick = ["--trainer.max_steps=1", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1",
             "--trainer.enable_progress_bar=false", "--trainer.val_check_interval=1",
             *(f"--model.net.{size}" for size in sizes)]  # fmt: skip
    main(["fit", "--config", "pmi_masking/glosses_random_token", *small, *quick])
    path = "lightning_logs/version_0/checkpoints/last.ckpt"
    module = TextClassification(path, task="cola")
    weights = torch.load(path, weights_only=True)["state_dict"]
    for name, weight in encoder(module.net).items():
        assert torch.equal(weight, weights[f"net.bert.{name}"]), name


def test_a_checkpoint_that_does_not_describe_its_network_is_refused(tmp_path):
    module = MaskedLM(MaskedLM(SMALL).net)
    trainer = quiet(max_steps=1)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "live.ckpt")
    with pytest.raises(
        ValueError, match="net must be a checkpoint of a MaskedLM that a recipe trained, and .*live.ckpt"
    ):
        TextClassification(str(tmp_path / "live.ckpt"), task="cola")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"net": {"hidden_size": 8}}, "net must have a model_type, such as bert, got hidden_size, num_labels"),
        ({"net": SMALL, "warmup": 1.0}, "warmup must be a share from 0 to below 1, got 1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextClassification(**arguments, task="cola")


@pytest.mark.parametrize("config", [RobertaConfig(vocab_size=30, type_vocab_size=1), DistilBertConfig(vocab_size=30)])
def test_types_of_tokens_are_left_out_where_a_network_knows_none(config):
    sizes = {"hidden_size": 8, "dim": 8, "hidden_dim": 16, "intermediate_size": 16}
    for name, value in {**sizes, "num_hidden_layers": 1, "n_layers": 1, "num_attention_heads": 2, "n_heads": 2}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    net = AutoModelForSequenceClassification.from_config(config).eval()
    tokens = torch.randint(5, 30, (2, 6))
    logits = TextClassification(net, task="cola")(input_ids=tokens, token_type_ids=torch.ones_like(tokens))
    torch.testing.assert_close(logits, net(input_ids=tokens).logits)


def test_types_of_tokens_reach_a_network_that_knows_them():
    net = make_task_network(SMALL, "AutoModelForSequenceClassification", num_labels=2).eval()
    tokens, types = torch.randint(5, 30, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    logits = TextClassification(net, task="cola")(input_ids=tokens, token_type_ids=types)
    torch.testing.assert_close(logits, net(input_ids=tokens, token_type_ids=types).logits)
    assert not torch.equal(logits, net(input_ids=tokens).logits)


def data(**more):
    path = write(glue_rows("mrpc"))
    return TextClassificationDataModule(path, tokenizer="embedded", task="mrpc", **{**HALVES, **more})


def test_the_rate_goes_up_and_down_in_straight_lines_over_all_steps():
    class Rates(TextClassification):
        def on_train_batch_start(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), self.optimizers().param_groups[0]["lr"]]

    module = Rates(SMALL, task="mrpc", warmup=0.25)
    quiet(max_epochs=4).fit(module, data())
    expected = [3e-5 * min(step / 3, (12 - step) / 9) for step in range(12)]  # 10 rows in batches of 4: 3 an epoch
    assert module.seen == pytest.approx(expected)


def test_without_an_end_there_is_no_schedule():
    with pytest.raises(ValueError, match="trainer.max_epochs or max_steps must be set, or else lr_scheduler"):
        quiet(max_epochs=-1).fit(TextClassification(SMALL, task="mrpc"), data())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_loss_is_the_mean_over_all_rows_each_once(precision):
    module = TextClassification(SMALL, task="mrpc")
    before = copy.deepcopy(module).eval()
    trainer = quiet(precision=precision)
    (found,) = trainer.validate(module, data(eval_batch_size=4), verbose=False)
    served = trainer.datamodule
    batch = served.collate([served.rows["val"][row] for row in range(10)])
    expected = before.loss(before(**batch.inputs), batch).mean().detach()
    assert found["val/loss"] == pytest.approx(float(expected), abs=1e-5 if precision == "32-true" else 0.02)


def test_a_diverged_run_has_no_number_for_a_loss():
    module = TextClassification(SMALL, task="mrpc")
    with torch.no_grad():
        module.net.classifier.bias.fill_(math.inf)
    (found,) = quiet().validate(module, data(), verbose=False)
    assert math.isnan(found["val/loss"])


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    def train(folder, ckpt_path, on_batch):
        module = TextClassification({**SMALL, "hidden_dropout_prob": 0.1}, task="mrpc")
        callbacks = [ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1), BatchReporter(on_batch)]
        trainer = quiet(max_epochs=3, enable_checkpointing=True, callbacks=callbacks, default_root_dir=folder)
        trainer.fit(module, data(), ckpt_path=ckpt_path)
        return module.state_dict()

    assert_resume_equals_uninterrupted(train, tmp_path, kill_at=6)


def _fit(strategy, path):
    processes = dist.get_world_size() if dist.is_initialized() else 1
    settings = {"tokenizer": "embedded", "task": "mrpc", **HALVES, "batch_size": 10 // processes}
    module = TextClassification(SMALL, task="mrpc", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    ranks = {"strategy": STRATEGIES[strategy](), "plugins": [Ranks()], "devices": processes}
    trainer = quiet(max_epochs=3, **(ranks if processes > 1 else {}))
    trainer.fit(module, TextClassificationDataModule(path, **settings))
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(strategy):
    path = write(glue_rows("mrpc"))
    seed_everything(0, verbose=False)
    one = _fit(strategy, path)
    seed_everything(0, verbose=False)
    for found in run_distributed(_fit, strategy, path):
        assert found == pytest.approx(one, rel=1e-4)
