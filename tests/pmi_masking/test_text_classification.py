import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lightning_iclr.__main__ import main
from lightning_iclr.pmi_masking import MaskedLM, TextClassification, TextClassificationDataModule, load_tokenizer
from lightning_iclr.pmi_masking.glue import TASKS
from tests.pmi_masking.evaluation_toys import ONE_CPU, SMALL, glue_rows, quiet, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]
PARTS = {"train_split": "train", "val_split": "train", "test_split": "train", "batch_size": 4}


def data(task, rows=None, **more):
    path = write(glue_rows(task) if rows is None else rows)
    return TextClassificationDataModule(path, **{"tokenizer": "embedded", "task": task, **PARTS, **more})


def ready(task, stage="fit", **more):
    served = data(task, **more)
    served.prepare_data()
    served.setup(stage)
    return served


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_other_packages(task):
    generator = np.random.default_rng(0)
    known = TASKS[task]
    if known.num_classes == 1:
        labels, given = generator.uniform(0, 5, 40), generator.uniform(0, 5, (40, 1))
        expected = {"pearson": pearsonr(labels, given[:, 0])[0], "spearman": spearmanr(labels, given[:, 0])[0]}
    else:
        labels, given = generator.integers(0, known.num_classes, 40), generator.dirichlet([1] * known.num_classes, 40)
        guess = given.argmax(axis=1)
        expected = {"accuracy": accuracy_score(labels, guess)}
        expected |= {"f1": f1_score(labels, guess)} if known.score == "f1" else {}
        expected |= {"matthews": matthews_corrcoef(labels, guess)} if known.score == "matthews" else {}
    found = known.measure(torch.from_numpy(given).float(), torch.from_numpy(labels).float())
    assert found == pytest.approx({name: 100 * value for name, value in expected.items()}, abs=1e-3)
    assert known.score in found


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb", "mnli"])
def test_the_loss_is_the_library_models_own_and_ten_rows_are_learned(task):
    served = ready(task)
    batch = served.collate([served.rows["train"][row] for row in range(10)])
    module = TextClassification(SMALL, task=task, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    theirs = module.eval().net(**batch.inputs, labels=batch.labels)
    torch.testing.assert_close(module.loss(module(**batch.inputs), batch).mean(), theirs.loss)
    trainer = quiet(max_epochs=20)
    trainer.fit(module.train(), served)
    assert float(trainer.callback_metrics["val/score"]) > 70


@pytest.mark.parametrize("length", [9, 12, 40])
def test_two_texts_are_cut_the_longer_first(length):
    rows = [{"sentence1": "a b c d e f g h", "sentence2": "k l m", "label": 0, "idx": 0}]
    served = ready("mrpc", rows=rows * 2, max_length=length)
    batch = served.collate([served.rows["train"][0]])
    tokenizer, cut = load_tokenizer("embedded"), {"truncation": "longest_first", "max_length": length}
    expected = tokenizer("a b c d e f g h", "k l m", **cut, return_token_type_ids=True)
    assert batch.inputs["input_ids"][0].tolist() == expected["input_ids"]
    assert batch.inputs["token_type_ids"][0].tolist() == expected["token_type_ids"]


def test_both_parts_of_mnli_are_scored_together_and_apart():
    rows = glue_rows("mnli")
    files = {"validation_matched": write(rows[:6], "matched.jsonl")}
    files |= {"validation_mismatched": write(rows[6:], "mismatched.jsonl")}
    settings = {"tokenizer": "embedded", "task": "mnli", "data_files": files, "train_split": "validation_matched"}
    served = TextClassificationDataModule("json", **settings)
    (found,) = quiet().validate(TextClassification(SMALL, task="mnli"), served, verbose=False)
    parts = 6 * found["val/accuracy_matched"] + 4 * found["val/accuracy_mismatched"]
    assert found["val/score"] == found["val/accuracy"] == pytest.approx(parts / 10)


def test_a_task_of_ones_own_has_its_columns_and_classes():
    rows = [{"said": f"it is {word}", "kind": number % 4} for number, word in enumerate("abcdefgh")]
    settings = {"text_columns": ["said"], "label_column": "kind", "num_classes": 4}
    served = data(None, rows=rows, **settings)
    (found,) = quiet().validate(TextClassification(SMALL, num_classes=4), served, verbose=False)
    assert found.keys() == {"val/loss", "val/accuracy", "val/score"}
    with pytest.raises(ValueError, match="model.num_classes must be the number of the data's classes, 4, got 3"):
        quiet().validate(TextClassification(SMALL, num_classes=3), data(None, rows=rows, **settings), verbose=False)


@pytest.mark.slow
def test_the_recipe_fine_tunes_tests_and_predicts_from_what_a_masked_lm_saved(capsys):
    MaskedLM(SMALL).save_pretrained("pretrained", load_tokenizer("embedded"))
    own = [f"--data.dataset={write(glue_rows('mrpc'))}", "--data.train_split=train", "--data.val_split=train",
           "--data.test_split=train", "--data.batch_size=4", *ONE_CPU]  # fmt: skip
    main(["fit", "--config", "pmi_masking/finetune_glue", *own])
    command = capsys.readouterr().out.splitlines()[-1].split()[1:]
    main(command)
    assert "test/f1" in capsys.readouterr().out
    main(["predict", *command[1:]])
    (path,) = Path().rglob("predictions.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["id"]) for row in rows] == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "glue"}, "task must be one of cola, sst2, .*, got 'glue'"),
        ({"task": None}, "text_columns must be one column or two, without a task, got None"),
        ({"task": None, "text_columns": ["sentence"]}, "num_classes must be at least 1, without a task, got None"),
        ({"task": "cola", "max_length": 3}, "max_length must be at least 4, got 3"),
        ({"task": "cola", "text_columns": ["text"]}, r"text_columns\[0\]='text' is no column of train_split"),
        (
            {"task": "cola", "rows": [{"sentence": "a", "label": 2}] * 2},
            "label must be a class from 0 to 1 in each row",
        ),
    ],
)
def test_bad_arguments_and_data_are_refused_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        ready(**{"rows": glue_rows("cola"), **arguments})


def test_a_module_of_another_task_than_the_data_is_refused():
    with pytest.raises(ValueError, match="model.task must be data.task, mrpc, got cola"):
        quiet(max_epochs=1).fit(TextClassification(SMALL, task="cola"), data("mrpc"))
    with pytest.raises(ValueError, match="either task or num_classes must be given, got 'cola' and 2"):
        TextClassification(SMALL, task="cola", num_classes=2)
