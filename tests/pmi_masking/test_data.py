import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedTokenizerFast

from lightning_iclr.embedded import load_wordnet
from lightning_iclr.pmi_masking import (
    GlossesDataModule,
    MaskedTextDataModule,
    MaskingVocabulary,
    load_glosses,
    load_tokenizer,
)
from lightning_iclr.pmi_masking.data import PackedRows
from lightning_iclr.sampling import SampleKey
from tests.distributed import run_distributed

pytestmark = pytest.mark.filterwarnings("ignore:only .* n-grams of .* words are frequent")


@pytest.fixture(scope="module")
def texts():
    return load_glosses()["validation"]["text"][:600]


def tables(texts):
    return DatasetDict(
        {"train": Dataset.from_dict({"text": texts}), "validation": Dataset.from_dict({"text": texts[:90]})}
    )


def data_module(texts, cache, **options):
    defaults = {
        "tokenizer": "embedded", "sequence_length": 32, "vocabulary_size": 100, "min_count": 3, "batch_size": 8,
        "vocabulary_proportions": (0.5, 0.5), "cache_dir": cache,
    }  # fmt: skip
    return MaskedTextDataModule(tables(texts), **{**defaults, **options})


def ready(texts, cache, **options):
    data = data_module(texts, cache, **options)
    data.prepare_data()
    data.setup()
    return data


def as_rows(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize("masking", ["pmi", "whole_word", "random_span", "random_token"])
def test_batches_predict_the_budget_of_every_row_and_spell_the_texts(texts, tmp_path, masking):
    data = ready(texts, tmp_path, masking=masking)
    spelt = []
    for batch in data.val_dataloader():
        original = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
        special = torch.isin(original, torch.tensor(data.tokenizer.all_special_ids))
        words = (~special & (batch["attention_mask"] == 1)).sum(1)
        budgets = torch.clamp(torch.round(0.15 * words), min=1)
        assert torch.equal((batch["labels"] != -100).sum(1).float(), budgets)
        for row, documents in zip(original, batch["document_ids"], strict=True):
            spelt += row[(documents >= 0) & ~torch.isin(row, torch.tensor([2, 3]))].tolist()  # not [CLS], [SEP]
    assert spelt == [
        number for ids in data.tokenizer(texts[:90], add_special_tokens=False)["input_ids"] for number in ids
    ]


def test_validation_masks_do_not_depend_on_the_epoch_and_training_masks_do(texts, tmp_path):
    data = ready(texts, tmp_path, masking="whole_word")
    for loader, same in ((data.val_dataloader(), True), (data.train_dataloader(), False)):
        passes = []
        for epoch in (0, 1):
            keys = [SampleKey(row, epoch, False) for row in range(8)]
            loader.sampler.set_epoch(epoch)
            passes.append(as_rows([data.collator([data.rows["val" if same else "train"][key] for key in keys])]))
            first = next(iter(loader))
            if same:
                torch.testing.assert_close(first["labels"][:8], passes[-1]["labels"], rtol=0, atol=0)
        assert torch.equal(passes[0]["labels"], passes[1]["labels"]) == same


@pytest.mark.parametrize("masking", ["pmi", "random_span"])
def test_workers_do_not_change_the_masks(texts, tmp_path, masking):
    alone, workers = (
        as_rows(list(ready(texts, tmp_path, masking=masking, num_workers=number).train_dataloader()))
        for number in (0, 2)
    )
    torch.testing.assert_close(alone, workers, rtol=0, atol=0)


class Recorder(LightningModule):
    """Keep each batch's rows, and fail at a step."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight, self.fail_at, self.seen = torch.nn.Parameter(torch.zeros(())), fail_at, []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("killed")
        self.seen.append((batch["input_ids"].clone(), batch["labels"].clone()))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def recorded(module, data, folder, ckpt_path=None):
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    if module.fail_at is None:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    else:
        with pytest.raises(RuntimeError, match="killed"):
            trainer.fit(module, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "killed.ckpt")
    return module.seen


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_a_run_that_is_resumed_in_mid_epoch_sees_the_same_rows_under_the_same_masks(texts, tmp_path):
    whole = recorded(Recorder(), ready(texts, tmp_path), tmp_path)
    steps = len(whole) // 2
    first = recorded(Recorder(fail_at=steps + 3), ready(texts, tmp_path), tmp_path)
    rest = recorded(Recorder(), ready(texts, tmp_path), tmp_path, ckpt_path=tmp_path / "killed.ckpt")
    assert len(first) == steps + 3
    for own, other in zip([*first, *rest], whole, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def _rows_of_a_rank(texts, folder):
    data = data_module(texts, folder)
    data.setup()
    batches = list(data.train_dataloader())
    torch.save(as_rows(batches), f"{folder}/rank{torch.distributed.get_rank()}.pt")


def test_two_processes_mask_the_rows_as_one_does(texts, tmp_path):
    alone = as_rows(list(ready(texts, tmp_path, batch_size=16).train_dataloader()))
    run_distributed(_rows_of_a_rank, texts, str(tmp_path))
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]

    def sorted_rows(rows):
        both = torch.cat([rows["input_ids"], rows["labels"]], dim=1).numpy()
        return both[np.lexsort(both.T)]

    together = {name: torch.cat([part[name] for part in parts]) for name in alone}
    length = min(len(alone["labels"]), len(together["labels"]))  # drop_last differs by less than a batch
    assert length >= len(alone["labels"]) - 16
    ours, theirs = ({tuple(row) for row in sorted_rows(rows).tolist()} for rows in (alone, together))
    assert len(ours & theirs) >= length


def test_what_only_fills_up_a_process_is_not_predicted(texts, tmp_path):
    data = ready(texts, tmp_path)
    batch = data.collator([data.rows["val"][SampleKey(0, 0, True)], data.rows["val"][SampleKey(1, 0, False)]])
    assert (batch["labels"][0] == -100).all()
    assert (batch["labels"][1] != -100).any()


def test_tokens_and_vocabulary_are_made_once_for_each_content_and_setting(texts, tmp_path):
    ready(texts, tmp_path)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    ready(texts, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == first
    ready(texts, tmp_path, sequence_length=16)
    rows = len(first) + 2
    assert len(list(tmp_path.iterdir())) == rows
    ready(texts, tmp_path, vocabulary_score="frequency")
    assert len(list(tmp_path.iterdir())) == rows + 1
    ready([*texts[1:], "a new text"], tmp_path)
    assert len(list(tmp_path.iterdir())) == rows + 4  # the validation texts are others, too, and the vocabulary
    assert not list(tmp_path.glob("*.partial"))


def test_a_tokenizer_is_trained_on_the_training_texts_where_none_is_given(texts, tmp_path):
    data = ready(texts, tmp_path, tokenizer=None, tokenizer_size=400, masking="whole_word")
    assert len(data.tokenizer) == 400
    text = " ".join(texts).lower()
    special = set(data.tokenizer.all_special_tokens)
    assert all(piece.removeprefix("##") in text for piece in set(data.tokenizer.get_vocab()) - special)
    assert data.tokenizer.unk_token_id not in data.tokenizer(text)["input_ids"]
    again = ready(texts, tmp_path, tokenizer=None, tokenizer_size=400, masking="whole_word")
    assert again.tokenizer.get_vocab() == data.tokenizer.get_vocab()


def test_a_vocabulary_file_is_used_as_it_is(texts, tmp_path):
    (tmp_path / "list.txt").write_text("of the\n")
    data = ready(texts, tmp_path / "cache", vocabulary=str(tmp_path / "list.txt"))
    assert data.collator.matcher.vocabulary.table["words"].to_pylist() == ["of the"]


def test_a_vocabulary_that_is_built_is_that_of_the_training_texts(texts, tmp_path):
    data = ready(texts, tmp_path)
    expected = MaskingVocabulary.build(texts, size=100, proportions=(0.5, 0.5), min_count=3)
    assert data.collator.matcher.vocabulary.table.equals(expected.table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "spans"}, "masking must be 'pmi', .* got 'spans'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_length": 2}, "sequence_length must be at least 3, got 2"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
    ],
)
def test_arguments_outside_their_range_are_refused(texts, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        data_module(texts, tmp_path, **options)


def test_a_missing_column_or_split_and_an_empty_part_are_told(texts, tmp_path):
    with pytest.raises(ValueError, match="text_column='body' is no column of train_split, which has: text"):
        data_module(texts, tmp_path, text_column="body").prepare_data()
    with pytest.raises(ValueError, match="val_split='dev' is no split"):
        data_module(texts, tmp_path, val_split="dev").prepare_data()
    with pytest.raises(ValueError, match="test_split must name a part of the data to test on, got None"):
        ready(texts, tmp_path).test_dataloader()
    parts = {"train": Dataset.from_dict({"text": texts}), "validation": Dataset.from_dict({"text": [""]})}
    data = MaskedTextDataModule(DatasetDict(parts), masking="whole_word", tokenizer="embedded", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="val_split has no text with a token in column 'text'"):
        data.prepare_data()


def test_a_tokenizer_without_a_mask_is_refused():
    tokenizer = load_tokenizer("embedded")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(ValueError, match="tokenizer must have a cls_token"):
        load_tokenizer(bare)


def test_the_embedded_tokenizer_is_berts_of_its_vocabulary():
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer("embedded")
    theirs = transformers.BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=True)
    for text in ["The café's owner, São Paulo!", "unbelievably 北京 naïve", *load_wordnet()["gloss"][:50]]:
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]


def test_the_parts_of_the_glosses_are_disjoint_and_cover_every_definition_once():
    parts = load_glosses()
    sizes = {name: part.num_rows for name, part in parts.items()}
    assert (sizes["validation"], sizes["test"], sizes["probe"]) == (4_000, 7_000, 15_000)
    definitions = {gloss.split('; "')[0].strip() for gloss in load_wordnet()["gloss"]}
    texts = [text for part in parts.values() for text in part["text"]]
    assert len(texts) == len(set(texts)) == len(definitions)
    assert set(texts) == definitions
    wordnet = load_wordnet()
    for row in parts["probe"].select(range(50)):
        synset = wordnet[row["synset"]]
        assert synset["gloss"].startswith(row["text"])
        assert synset["pos"] in {"noun": "n", "verb": "v", "adjective": "as", "adverb": "r"}[row["pos"]]
    assert load_glosses(1)["test"]["text"] != parts["test"]["text"]
    assert load_glosses()["test"]["text"] == parts["test"]["text"]


def test_the_glosses_module_serves_three_parts(tmp_path):
    data = GlossesDataModule(masking="random_token", cache_dir=tmp_path)
    data.prepare_data()
    data.setup()
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"].shape == (64, 64)
    assert data.rows.keys() == {"train", "val", "test"}
    assert isinstance(data.rows["test"], PackedRows)
