import copy

import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lightning_iclr.pmi_masking import MaskedLM, MaskedTextDataModule, load_tokenizer
from lightning_iclr.pmi_masking.model import param_groups, repeated_layers, run_at
from lightning_iclr.pmi_masking.packing import attention_mask_of, positions_of
from tests.distributed import Ranks, run_distributed
from tests.pmi_masking.toys import paragraphs

SMALL = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def bert(**more):
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SMALL, **more)).eval()


def batch(rows=3, length=10):
    torch.manual_seed(1)
    tokens = torch.randint(5, 30, (rows, length))
    labels = torch.where(torch.rand(rows, length) < 0.4, tokens, -100)
    documents = torch.zeros(rows, length, dtype=torch.long)
    documents[:, 6:] = 1
    unit_ids = torch.arange(length).div(2, rounding_mode="floor").expand(rows, length).clone()
    unit_ids[:, 0] = -1
    attention = torch.ones_like(tokens)
    found = {"input_ids": tokens, "labels": labels, "attention_mask": attention, "document_ids": documents}
    return {**found, "unit_ids": unit_ids}


@pytest.mark.parametrize("sparse", [True, False])
def test_the_loss_is_the_library_models_own(sparse):
    net, data = bert(), batch()
    masked = run_at(net, data, sparse)
    theirs = net(
        input_ids=data["input_ids"],
        attention_mask=attention_mask_of(data["document_ids"]),
        position_ids=positions_of(data["document_ids"]),
        labels=data["labels"],
    )
    torch.testing.assert_close(F.cross_entropy(masked.logits, masked.labels), theirs.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(masked.logits, theirs.logits[data["labels"] != -100], rtol=0, atol=1e-6)


def test_the_sparse_head_has_the_gradients_of_the_whole_one():
    data, gradients = batch(), []
    for sparse in (True, False):
        net = bert()
        masked = run_at(net, data, sparse)
        F.cross_entropy(masked.logits, masked.labels).backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-6)


def test_only_what_is_predicted_reaches_the_sparse_head():
    net, data, seen = bert(), batch(), []
    net.cls.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    run_at(net, data, sparse=True)
    assert seen == [(1, int((data["labels"] != -100).sum()), 8)]


def test_robertas_positions_come_after_that_of_its_padding():
    torch.manual_seed(0)
    net = RobertaForMaskedLM(RobertaConfig(**SMALL, pad_token_id=1, max_position_embeddings=20)).eval()
    data = batch(rows=1)
    data["labels"] = data["input_ids"]
    packed = run_at(net, data, sparse=False).logits[6:]
    alone = net(input_ids=data["input_ids"][:, 6:]).logits[0]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_packed_text_gets_the_logits_that_it_gets_alone(kind, attention):
    torch.manual_seed(0)
    more = {"local_attention": 4, "global_attn_every_n_layers": 2} if kind == "modernbert" else {}
    config = AutoConfig.for_model(kind, **SMALL, **more, pad_token_id=0)
    net = AutoModelForMaskedLM.from_config(config, attn_implementation=attention).eval()
    data = batch(rows=2, length=24)
    data["labels"] = data["input_ids"]
    packed = run_at(net, data, sparse=False).logits.view(2, 24, -1)
    for begin, end in ((0, 6), (6, 24)):  # the latter longer than what a layer with a window sees
        alone = net(input_ids=data["input_ids"][:, begin:end], attention_mask=torch.ones(2, end - begin)).logits
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=0, atol=1e-5)


def test_the_layers_that_are_sharded_are_the_repeated_ones():
    net = bert()
    assert repeated_layers(net) == list(net.bert.encoder.layer)
    size = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 30}
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **size))
    assert repeated_layers(t5) == [*t5.encoder.block, *t5.decoder.block]
    assert repeated_layers(torch.nn.Linear(2, 2)) == []


STRATEGIES = {"ddp": DDPStrategy, "fsdp": lambda: ModelParallelStrategy(save_distributed_checkpoint=False)}


def learned(folder, strategy, path):
    """Train three steps on a global batch of eight rows, in one process or in those there are."""
    torch.manual_seed(0)
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    parallel = {"devices": 2, "strategy": STRATEGIES[strategy](), "plugins": [Ranks()]} if world_size > 1 else {}
    texts = Dataset.from_dict(
        {"text": [text[: 40 * (1 + number % 5)] for number, text in enumerate(paragraphs()[:60])]}
    )
    data = MaskedTextDataModule(
        DatasetDict({"train": texts, "validation": texts.select(range(9))}), masking="whole_word", cache_dir=folder,
        tokenizer="embedded", sequence_length=32, batch_size=8 // world_size, eval_batch_size=3,
    )  # fmt: skip
    net = {"model_type": "bert", **SMALL, "vocab_size": 8000, "hidden_dropout_prob": 0.0}
    net["attention_probs_dropout_prob"] = 0.0
    module = MaskedLM(net, optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    trainer = Trainer(
        accelerator="cpu", max_steps=3, val_check_interval=3, check_val_every_n_epoch=None, logger=False,
        gradient_clip_val=1.0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **{"devices": 1, **parallel},
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(path)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(tmp_path, strategy):
    # The rows have unequal numbers of predicted tokens, and the last validation batch is not full.
    one = learned(tmp_path, strategy, tmp_path / "one.ckpt")
    for metrics in run_distributed(learned, tmp_path, strategy, tmp_path / "two.ckpt"):
        assert metrics == pytest.approx(one, abs=1e-5)
    expected, got = (torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("one.ckpt", "two.ckpt"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_unit_lengths_are_counted_in_tokens_of_the_row():
    data = batch(rows=2)
    masked = run_at(bert(), data, sparse=True)
    expected = [
        sum(int(other) == int(unit) for other in row)
        for row, labels in zip(data["unit_ids"], data["labels"], strict=True)
        for unit, label in zip(row, labels, strict=True)
        if label != -100
    ]
    assert masked.lengths.tolist() == expected


def test_biases_and_norms_do_not_decay():
    net = bert()
    decayed, free = (group["params"] for group in param_groups(net))
    assert len(decayed) + len(free) == len(list(net.parameters()))
    assert {p.ndim for p in decayed} == {2}
    assert {p.ndim for p in free} == {1}
    assert param_groups(net)[1]["weight_decay"] == 0.0


def test_settings_a_name_and_a_module_are_networks(tmp_path):
    net = bert()
    net.save_pretrained(tmp_path)
    loaded = MaskedLM(str(tmp_path)).net
    torch.testing.assert_close(dict(loaded.state_dict()), dict(net.state_dict()))
    assert loaded.training  # else its dropout would do nothing
    assert MaskedLM(net).net is net
    assert MaskedLM({"model_type": "bert", **SMALL}).net.config.hidden_size == 8
    with pytest.raises(ValueError, match="net must have a model_type, .* got vocab_size"):
        MaskedLM(dict(SMALL))


def test_what_is_saved_loads_with_equal_logits_and_the_tokenizer(tmp_path):
    tokenizer = load_tokenizer("embedded")
    module = MaskedLM({"model_type": "bert", **SMALL, "vocab_size": 8000}).eval()
    module.save_pretrained(tmp_path, tokenizer)
    theirs, their_tokenizer = (
        AutoModelForMaskedLM.from_pretrained(tmp_path).eval(),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    tokens = their_tokenizer("the capital of Sri Lanka", return_tensors="pt")["input_ids"]
    assert tokens.tolist()[0] == tokenizer("the capital of Sri Lanka")["input_ids"]
    torch.testing.assert_close(theirs(tokens).logits, module(tokens), rtol=0, atol=0)
    with pytest.raises(TypeError, match="net must be a model of transformers .* got Linear"):
        MaskedLM(torch.nn.Linear(2, 2)).save_pretrained(tmp_path)


def fit(module, **options):
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=4, logger=False, enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    rows = [{name: value[0] for name, value in batch(rows=1).items()} for _ in range(8)]
    trainer.fit(module, DataLoader(rows, batch_size=2), DataLoader(rows, batch_size=2))
    return trainer


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_lowers_the_loss_and_logs_it_for_each_length_of_unit(precision):
    module = MaskedLM({"model_type": "bert", **SMALL}, optimizer=lambda params: torch.optim.Adam(params, lr=0.01))
    before = copy.deepcopy(module)
    trainer = fit(module, precision=precision)
    metrics = trainer.callback_metrics
    assert {"train/loss", "val/loss", "val/accuracy", "train/loss_unit_2"} <= metrics.keys()
    data = batch()
    losses = [
        F.cross_entropy(out.logits, out.labels) for out in (m.eval().predict_masked(data) for m in (before, module))
    ]
    assert losses[1] < losses[0]


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_the_validation_loss_is_the_mean_over_all_predicted_tokens():
    module = MaskedLM(bert().train(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    trainer = fit(module)
    out = module.eval().predict_masked(batch(rows=1))
    expected = F.cross_entropy(out.logits, out.labels)
    torch.testing.assert_close(trainer.callback_metrics["val/loss"], expected.detach(), rtol=0, atol=1e-5)
    accuracy = (out.logits.argmax(-1) == out.labels).float().mean()
    torch.testing.assert_close(trainer.callback_metrics["val/accuracy"], accuracy, rtol=0, atol=1e-6)


def test_prediction_puts_the_likeliest_tokens_where_something_is_predicted():
    module, data = MaskedLM(bert()).eval(), batch()
    tokens = module.predict_step(data, 0)
    chosen = data["labels"] != -100
    assert torch.equal(tokens[~chosen], data["input_ids"][~chosen])
    assert torch.equal(tokens[chosen], module.predict_masked(data).logits.argmax(-1))
