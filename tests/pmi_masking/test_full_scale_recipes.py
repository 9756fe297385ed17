"""The paper's pre-training runs, with small networks on local data in the hub's columns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoModelForMaskedLM

from lightning_iclr.__main__ import main
from lightning_iclr._recipes import recipe_root
from lightning_iclr.pmi_masking import MaskedLM, MaskingVocabulary, PMIMaskingCollator, load_tokenizer
from tests.pmi_masking.toys import paragraphs
from tests.recipes.test_recipes import FAST, ONE_CPU

NAMES = ["bert_base_wiki_books", "bert_base_wiki_books_openwebtext", "modernbert_pmi"]
COLUMNS = {
    "wikimedia/wikipedia": ["id", "url", "title", "text"],
    "bookcorpus/bookcorpus": ["text"],
    "Skylion007/openwebtext": ["text"],
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:only .* n-grams of .* words are frequent"),
]


def recipe(name):
    return yaml.safe_load((recipe_root() / f"pmi_masking/{name}.yaml").read_text())


def header_command(name):
    """The arguments of the command that the header wants to be run first."""
    lines = (recipe_root() / f"pmi_masking/{name}.yaml").read_text().splitlines()
    text = " ".join(line[1:].strip() for line in lines if line.startswith("#   "))
    text = " ".join(text.replace("\\", " ").split())
    data = re.search(r"--data '(\[.*\])'", text)[1]
    rest = text.replace(f"--data '{data}'", "").split()
    assert rest[:2] == ["lightning-iclr", "pmi-vocabulary"]
    return ["pmi-vocabulary", *rest[2:]], yaml.safe_load(data)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file for each data set of the hub, with its columns."""
    folder = tmp_path_factory.mktemp("hub")
    texts = paragraphs()
    found = {}
    for number, (name, columns) in enumerate(COLUMNS.items()):
        own = texts[number * 150 : (number + 1) * 150]
        found[name] = folder / f"{name.partition('/')[2]}.parquet"
        Dataset.from_dict({column: own for column in columns}).to_parquet(found[name])
    load_tokenizer("embedded").save_pretrained(folder / "tokenizer")
    return found


def local(sources, files):
    """The sources of a recipe, read from the files."""
    return [{"dataset": str(files[each["dataset"]]), "join": each.get("join", 1)} for each in sources]


def shrunk(name, files):
    """Arguments that let a full-scale recipe run on two rows a step, on what the header's command has built."""
    data = recipe(name)["data"]["init_args"]
    command, sources = header_command(name)
    assert sources == data["dataset"]  # what is counted is what is read
    Path("spill").mkdir(exist_ok=True)
    quick = ["--data", str(local(sources, files)), "--size", "200", "--min_count", "2", "--memory_limit", "1GB"]
    main([part for part in command if part != "64GB" and part != "--memory_limit"] + quick)
    assert Path(data["vocabulary"]).is_file()
    small = [f"--model.net.{key}={value}" for key, value in SMALL.items()]
    small += [f"--data.dataset={local(sources, files)}", "--data.train_split=train[:-40]", "--data.cache_dir=cache",
              "--data.val_split=train[-40:]", "--data.batch_size=2", "--data.num_workers=0"]  # fmt: skip
    if "tokenizer" in data:
        small += [f"--data.tokenizer={files['wikimedia/wikipedia'].parent / 'tokenizer'}"]
    else:
        small += ["--data.tokenizer_size=800"]
    return small


QUICK = [*FAST, "--trainer.check_val_every_n_epoch=null"]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_scale_recipe_fits_two_steps_when_shrunk(name, files):
    main(["fit", "--config", f"pmi_masking/{name}", *shrunk(name, files), *ONE_CPU, *QUICK])
    checkpoint = Path("lightning_logs/version_0/checkpoints/last.ckpt")
    module = MaskedLM.load_from_checkpoint(checkpoint, weights_only=True)
    assert module.net.config.num_hidden_layers == 3
    drawn = {path.stem for path in Path("lightning_logs/version_0/figures").iterdir()}
    assert drawn == {"masked_paragraph", "unit_lengths", "loss_by_unit"}
    rows = np.memmap(next(Path("cache").glob("rows-train-*")) / "tokens.int32", np.int32, mode="r")
    assert len(rows) % 512 == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_full_scale_recipe_is_the_papers_run(name):
    own = recipe(name)
    trainer, model, data = own["trainer"], own["model"]["init_args"], own["data"]["init_args"]
    assert trainer["devices"] * data["batch_size"] == 256
    assert (trainer["max_steps"], trainer["precision"], data["sequence_length"]) == (1_000_000, "bf16-mixed", 512)
    assert model["optimizer"]["init_args"] == {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.01}
    schedule = {"warmup_steps": 10_000, "total_steps": 1_000_000, "end": 0.0}
    assert model["lr_scheduler"]["init_args"] == schedule
    net = dict(model["net"])
    config = AutoConfig.for_model(net.pop("model_type"), **net)
    reference = AutoConfig.for_model(config.model_type)  # the library's defaults are the base models
    for key, value in reference.to_dict().items():
        if key not in ("vocab_size", "transformers_version"):
            assert getattr(config, key) == value, key
    assert config.vocab_size == data.get("tokenizer_size", 50_368)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForMaskedLM.from_config(config).parameters())
    assert 105e6 < size < 155e6


def test_modernberts_recipe_masks_thirty_percent():
    masking = recipe("modernbert_pmi")["data"]["init_args"]["masking"]
    assert masking["class_path"] == f"lightning_iclr.pmi_masking.{PMIMaskingCollator.__name__}"
    assert masking["init_args"] == {"mlm_probability": 0.3}


@pytest.mark.parametrize("name", NAMES)
def test_the_headers_command_builds_the_authors_kind_of_list(name):
    command, _ = header_command(name)
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--count_weight"] == "2"
    assert options["--out"] == recipe(name)["data"]["init_args"]["vocabulary"]
    assert "--size" not in options  # the paper's 800,000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overlay"),
    [(NAMES[0], "trainer/ddp"), (NAMES[0], "trainer/fsdp"), (NAMES[2], "trainer/fsdp")],
)
def test_a_full_scale_recipe_runs_on_two_cpu_processes_under_an_overlay(name, overlay, files):
    small = shrunk(name, files)
    command = [sys.executable, "-m", "lightning_iclr", "fit", "--config", f"pmi_masking/{name}", "--config", overlay]
    command += [*small, *QUICK, "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.precision=32-true"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(recipe_root().parent), os.environ["PYTHONPATH"]])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "distributed_backend=gloo" in result.stderr
    module = MaskedLM.load_from_checkpoint("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    module.save_pretrained("saved")
    assert AutoModelForMaskedLM.from_pretrained("saved").config.num_hidden_layers == 3
    assert len(MaskingVocabulary.from_file("wiki_books.parquet")) > 100
