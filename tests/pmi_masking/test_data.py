import json
import pickle
import pkgutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from transformers import PreTrainedTokenizerFast, T5TokenizerFast

from lightning_iclr.cli import ICLRCLI
from lightning_iclr.embedded import load_wikipedia_sample, load_wordnet
from lightning_iclr.pmi_masking import (
    GlossesDataModule,
    LinearProbability,
    MaskedLM,
    MaskedTextDataModule,
    MaskingVocabulary,
    PMIMaskingCollator,
    RandomSpanCollator,
    SpanMaskingCollator,
    TextSource,
    VocabularySettings,
    WholeWordCollator,
    load_glosses,
    load_tokenizer,
)
from lightning_iclr.pmi_masking.collator import Selection
from lightning_iclr.pmi_masking.corpora import Corpus
from lightning_iclr.pmi_masking.data import PackedRows
from lightning_iclr.sampling import SampleKey
from tests.distributed import run_distributed
from tests.pmi_masking.toys import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:only .* n-grams of .* words are frequent")


@pytest.fixture(scope="module")
def texts():
    return load_glosses()["validation"]["text"][:600]


def tables(texts):
    return DatasetDict(
        {"train": Dataset.from_dict({"text": texts}), "validation": Dataset.from_dict({"text": texts[:90]})}
    )


def data_module(texts, cache, **options):
    settings = {"size": 100, "min_count": 3, "proportions": (0.5, 0.5), **options.pop("settings", {})}
    defaults = {"tokenizer": "embedded", "sequence_length": 32, "batch_size": 8, "cache_dir": cache}
    settings = VocabularySettings(**settings)
    return MaskedTextDataModule(tables(texts), vocabulary_settings=settings, **{**defaults, **options})


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
    ready(texts, tmp_path, settings={"score": "frequency"})
    assert len(list(tmp_path.iterdir())) == rows + 1
    ready(texts, tmp_path, settings={"score": "frequency", "memory_limit": "1GB"})  # which gives the same
    assert len(list(tmp_path.iterdir())) == rows + 1
    ready([*texts[1:], "a new text"], tmp_path)
    assert len(list(tmp_path.iterdir())) == rows + 4  # the validation texts are others, too, and the vocabulary
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("step", ["data.train_wordpiece", "data._tokenized", "vocabulary.pq.write_table"])
def test_a_process_that_is_overtaken_takes_what_the_other_has_made(tmp_path, monkeypatch, step):
    texts = [f"the city of new york has {number} {kind}" for number in range(50) for kind in ("rivers", "harbours")]
    options = {"tokenizer": None, "tokenizer_size": 60, "batch_size": 2}
    slower, faster = (data_module(texts, tmp_path, **options) for _ in range(2))
    target = f"lightning_iclr.pmi_masking.{step}"
    original, overtaken = pkgutil.resolve_name(target), []

    def slow(*arguments, **settings):
        result = original(*arguments, **settings)
        if not overtaken:
            overtaken.append(step)
            faster.prepare_data()
        return result

    monkeypatch.setattr(target, slow)
    slower.prepare_data()
    assert overtaken
    kinds = sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir())
    assert kinds == ["rows-train", "rows-val", "vocabulary", "wordpiece"]  # and nothing that is partial
    for data in (slower, faster):
        data.setup()
    assert slower.tokenizer.get_vocab() == faster.tokenizer.get_vocab()  # training twice gives other numbers
    own, other = (as_rows(list(data.train_dataloader())) for data in (slower, faster))
    torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_rows_that_cannot_be_written_leave_nothing_and_say_why(tmp_path, monkeypatch):
    def refuse(path, target):
        raise PermissionError("read-only")

    data = data_module(["a river of words"], tmp_path, masking="whole_word")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(PermissionError, match="read-only"):
            data.prepare_data()
    assert not list(tmp_path.iterdir())
    data.prepare_data()
    assert len(list(tmp_path.iterdir())) == 2


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
    with pytest.raises(FileNotFoundError, match="vocabulary must be a file, .* got nowhere.txt"):
        data_module(texts, tmp_path, vocabulary="nowhere.txt")


def test_a_vocabulary_that_is_built_is_that_of_the_training_texts(texts, tmp_path):
    data = ready(texts, tmp_path)
    expected = MaskingVocabulary.build(texts, size=100, proportions=(0.5, 0.5), min_count=3)
    assert data.collator.matcher.vocabulary.table.equals(expected.table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "spans"}, "masking must be one of pmi, .* or a class of collators, got 'spans'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_length": 2}, "sequence_length must be at least 3, got 2"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
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
    for _ in range(2):
        with pytest.raises(ValueError, match="val_split has no text with a token"):
            data.prepare_data()
    assert not list(tmp_path.glob("*.partial"))


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


class Everything(SpanMaskingCollator):
    """A masking of somebody else's: all of a row."""

    def __init__(self, tokenizer, share=1.0, **settings):
        super().__init__(tokenizer, mlm_probability=share, **settings)

    def select(self, rows, budgets):
        place = np.flatnonzero(rows.usable)
        return Selection(place, np.arange(len(place)), np.ones(len(place), bool))


def from_yaml(section):
    """Return the data module that the command line builds of a recipe's data section."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    return parser.instantiate_classes(parser.parse_object({"data": section})).data


GLOSSES = "lightning_iclr.pmi_masking.GlossesDataModule"


def test_a_recipe_reaches_every_argument_of_a_masking_and_of_a_vocabulary():
    schedule = {
        "class_path": "lightning_iclr.pmi_masking.LinearProbability",
        "init_args": {"start": 0.3, "end": 0.1, "epochs": 2},
    }
    spans = {
        "p": 0.4,
        "max_words": 3,
        "beyond": "clip",
        "mlm_probability": schedule,
        "mask_replace_prob": 1.0,
        "random_replace_prob": 0.0,
    }
    settings = {
        "size": 50,
        "score": "naive_pmi",
        "count_weight": 2.0,
        "punctuation": "keep",
        "deduplicate": "document",
        "lowercase": False,
        "strip_accents": False,
        "engine": "duckdb",
        "memory_limit": "1GB",
        "min_count": 4,
        "proportions": [0.5, 0.5],
    }
    masking = {"class_path": "lightning_iclr.pmi_masking.RandomSpanCollator", "init_args": spans}
    arguments = {"masking": masking, "vocabulary_settings": settings, "seed": 7}
    data = from_yaml({"class_path": GLOSSES, "init_args": arguments})
    collator = data.make_collator(load_tokenizer("embedded"), seed=data.seed)
    assert (collator.p, collator.max_words, collator.beyond, collator.seed) == (0.4, 3, "clip", 7)
    assert (collator.mask_replace_prob, collator.random_replace_prob) == (1.0, 0.0)
    assert [collator.mlm_probability(epoch) for epoch in range(4)] == pytest.approx([0.3, 0.2, 0.1, 0.1])
    assert data.vocabulary_settings == VocabularySettings(**settings)


def test_what_a_recipe_does_not_say_of_a_vocabulary_stays_as_the_module_has_it():
    data = from_yaml({"class_path": GLOSSES, "init_args": {"vocabulary_settings": {"score": "frequency"}}})
    assert data.vocabulary_settings == VocabularySettings(size=10_000, score="frequency")
    assert isinstance(data.make_collator(load_tokenizer("embedded"), seed=0), PMIMaskingCollator)


SPANS = ["--data.masking=lightning_iclr.pmi_masking.RandomSpanCollator", "--data.masking.max_words=4"]


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_the_command_line_reaches_the_arguments_of_a_masking(capsys):
    schedule = {"class_path": "lightning_iclr.pmi_masking.LinearProbability",
                "init_args": {"start": 0.3, "end": 0.1, "epochs": 2}}  # fmt: skip
    more = ["--data.masking.pad_to_multiple_of=24", f"--data.masking.mlm_probability={schedule}"]
    recipe = ["--config", "pmi_masking/glosses_random_span", "--data.vocabulary_settings.count_weight=2"]
    data = ICLRCLI(args=[*recipe, *SPANS, *more], run=False).datamodule
    collator = data.make_collator(load_tokenizer("embedded"), seed=0)
    assert (collator.max_words, collator.pad_to_multiple_of) == (4, 24)
    assert collator.mlm_probability == pickle.loads(pickle.dumps(LinearProbability(0.3, 0.1, 2)))
    assert data.vocabulary_settings == VocabularySettings(size=10_000, count_weight=2.0)
    for unknown in ("masking.max_word", "vocabulary_settings.max_word"):
        with pytest.raises(SystemExit):
            ICLRCLI(args=[*recipe, *SPANS, f"--data.{unknown}=4"], run=False)
        assert "max_word" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        (partial(RandomSpanCollator, p=4), "p must be in .* got 4"),
        (partial(WholeWordCollator, mlm_probability=2.0), "mlm_probability must be in .* got 2.0"),
        (partial(WholeWordCollator, denoising="sentinels"), "tokenizer must have sentinels"),
    ],
)
def test_arguments_of_a_masking_are_checked_before_a_tokenizer_is_trained(tmp_path, masking, message):
    data = data_module(["a river of words"], tmp_path, masking=masking, tokenizer=None)
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    assert not list(tmp_path.iterdir())


def test_a_masking_of_somebody_elses_is_served(texts, tmp_path):
    data = ready(texts, tmp_path, masking=partial(Everything, share=0.5))
    batch = next(iter(data.val_dataloader()))
    special = torch.isin(batch["input_ids"], torch.tensor([0, 2, 3]))
    assert torch.equal(batch["labels"] == -100, special)
    assert data.collator.seed == data.seed


def test_the_share_of_a_schedule_is_that_of_the_rows_epoch(texts, tmp_path):
    schedule = LinearProbability(start=0.5, end=0.1, epochs=1)
    data = ready(texts, tmp_path, masking=partial(WholeWordCollator, mlm_probability=schedule))
    counts = []
    for epoch in (0, 1):
        batch = data.collator([data.rows["train"][SampleKey(row, epoch, False)] for row in range(20)])
        counts.append(float((batch["labels"] >= 0).sum() / (batch["unit_ids"] >= 0).sum()))
    assert counts == pytest.approx([0.5, 0.1], abs=0.02)


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"end": 1.5}, {"epochs": 0}])
def test_a_schedule_outside_its_range_is_refused(wrong):
    ((name, number),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {number}"):
        LinearProbability(**{"start": 0.3, "end": 0.1, "epochs": 2, **wrong})


def test_several_sources_are_one_corpus(texts, tmp_path):
    for name, own, column in (("wiki", texts[:40], "text"), ("books", texts[40:61], "sentence")):
        Dataset.from_dict({column: own}).to_parquet(tmp_path / f"{name}.parquet")
    sources = [
        {"dataset": str(tmp_path / "wiki.parquet")},
        {"dataset": str(tmp_path / "books.parquet"), "text_column": "sentence", "join": 4},
    ]
    init = {"dataset": sources, "train_split": "train[:-4]", "val_split": "train[-4:]", "tokenizer": "embedded",
            "masking": "whole_word", "cache_dir": str(tmp_path / "cache"), "sequence_length": 64}  # fmt: skip
    data = from_yaml({"class_path": "lightning_iclr.pmi_masking.MaskedTextDataModule", "init_args": init})
    assert data.sources[1] == TextSource(str(tmp_path / "books.parquet"), text_column="sentence", join=4)
    data.prepare_data()
    data.setup()
    joined = [*texts[:36], *("\n".join(texts[at : min(at + 4, 57)]) for at in range(40, 57, 4))]
    expected = {"train": joined, "val": [*texts[36:40], "\n".join(texts[57:61])]}
    for split, own in expected.items():
        rows = data.rows[split]
        spelt = [number for row in range(len(rows)) for number in rows[row]["input_ids"].tolist() if number > 3]
        ids = data.tokenizer(own, add_special_tokens=False)["input_ids"]
        assert spelt == [number for text in ids for number in text]
    documents = np.concatenate([np.unique(rows[row]["document_ids"]) for row in range(len(rows))])
    assert (documents >= 0).sum() == 5  # the four, and one of four rows


def test_sources_in_the_hubs_columns_are_cut_one_by_one(tmp_path):
    wiki = [{"id": str(n), "url": "u", "title": "a title", "text": f"article {n} of the river"} for n in range(20)]
    books = [{"text": f"sentence {n} of the harbour"} for n in range(10)]
    for name, rows in (("wiki", wiki), ("books", books)):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    sources = [TextSource(str(tmp_path / "wiki.json")), TextSource(str(tmp_path / "books.json"))]
    data = MaskedTextDataModule(
        sources, train_split="train[10%:]", val_split="train[:10%]", tokenizer="embedded", masking="whole_word",
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    for split, expected in (("train", wiki[2:] + books[1:]), ("val", wiki[:2] + books[:1])):
        rows = data.rows[split]
        spelt = " ".join(data.decode(torch.stack([torch.from_numpy(row["input_ids"]) for row in rows])))
        assert [text.strip() for text in spelt.replace("[CLS]", "").split("[SEP]")[:-1]] == [
            row["text"] for row in expected
        ]


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "dataset must be one or more TextSource where it is a list, got none"),
        (["a/b", {"dataset": "c"}], {}, "dataset must be one or more TextSource .* got str, dict"),
        ([TextSource("a/b")], {"text_column": "body"}, "text_column must be an argument of each source .* got 'body'"),
        ([TextSource("a/b")], {"revision": "main"}, "revision must be an argument of each source .* got 'main'"),
    ],
)
def test_what_several_sources_cannot_say_is_refused(sources, options, message):
    with pytest.raises(ValueError, match=message):
        MaskedTextDataModule(sources, **options)


def test_rows_are_joined_across_what_is_read_at_once():
    rows = [str(number) for number in range(2002)]
    corpus = Corpus([(Dataset.from_dict({"text": rows}), TextSource("unread", join=3))])
    assert list(corpus) == ["\n".join(rows[at : at + 3]) for at in range(0, 2002, 3)]
    assert len(corpus) == 668


def test_a_source_joins_at_least_one_row():
    with pytest.raises(ValueError, match="join must be at least 1, got 0"):
        TextSource("glosses", join=0)


def test_an_embedded_corpus_is_served_by_its_name(tmp_path):
    options = {"masking": "whole_word", "tokenizer": "embedded", "cache_dir": tmp_path}
    data = MaskedTextDataModule("wikipedia", train_split="train[:20]", val_split="train[20:23]", **options)
    data.prepare_data()
    data.setup()
    paragraphs = [part["text"] for part in load_wikipedia_sample()[20]["paragraphs"]]
    expected = data.tokenizer("\n".join(paragraphs), add_special_tokens=False)["input_ids"]
    assert data.rows["val"][0]["input_ids"][1:-1].tolist() == expected[:510]


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_t5_learns_from_sentinels_by_a_recipes_arguments(texts, tmp_path):
    model = json.loads(make_tokenizer("unigram").backend_tokenizer.to_str())["model"]
    T5TokenizerFast(vocab=[tuple(piece) for piece in model["vocab"]], extra_ids=50).save_pretrained(tmp_path / "t5")
    masking = {
        "class_path": "lightning_iclr.pmi_masking.PMIMaskingCollator",
        "init_args": {"denoising": "sentinels", "mlm_probability": 0.3},
    }
    arguments = {"masking": masking, "tokenizer": str(tmp_path / "t5"), "train_split": "train[:400]",
                 "val_split": "validation[:100]", "cache_dir": str(tmp_path), "batch_size": 4,
                 "vocabulary_settings": {"size": 20, "min_count": 2, "proportions": [1.0]}}  # fmt: skip
    data = from_yaml({"class_path": GLOSSES, "init_args": arguments})
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    net = MaskedLM({"model_type": "t5", "vocab_size": 8100, **size})
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(net, data)
    batch = data.collator([data.rows["train"][0], data.rows["train"][1]])
    assert "unit_ids" not in batch
    masked, direct = net.eval().predict_masked(batch), net.net(**batch)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(masked.logits, masked.labels), direct.loss)
    written = net.predict_step(batch, 0)
    assert torch.equal(written[batch["labels"] >= 0], direct.logits.argmax(-1)[batch["labels"] >= 0])
    assert not written[batch["labels"] < 0].any()
