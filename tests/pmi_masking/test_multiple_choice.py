import csv
from pathlib import Path

import pytest
import torch

from lightning_iclr.__main__ import main
from lightning_iclr.pmi_masking import MaskedLM, MultipleChoice, MultipleChoiceDataModule, load_tokenizer
from lightning_iclr.pmi_masking.multiple_choice import fill_in
from tests.pmi_masking.evaluation_toys import ONE_CPU, SMALL, quiet, race_rows, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]
PARTS = {"train_split": "train", "val_split": "train", "test_split": "train", "batch_size": 4}


def data(rows=None, **more):
    path = write(race_rows() if rows is None else rows)
    return MultipleChoiceDataModule(path, **{"tokenizer": "embedded", "max_length": 40, **PARTS, **more})


def ready(stage="fit", **more):
    served = data(**more)
    served.prepare_data()
    served.setup(stage)
    return served


def changed(**columns):
    rows = race_rows()
    rows[0] |= columns
    return rows


def test_an_input_is_the_article_cut_and_the_whole_question_with_an_option():
    tokenizer = load_tokenizer("embedded")
    served = ready(max_length=24)
    batch = served.collate([served.rows["train"][row] for row in range(10)])
    assert batch.inputs["input_ids"].shape == (10, 4, 24)
    for row, example in enumerate(race_rows()):
        for place, option in enumerate(example["options"]):
            second = fill_in(example["question"], option)
            expected = tokenizer(
                example["article"], second, truncation="only_first", max_length=24, return_token_type_ids=True
            )
            own = batch.inputs["attention_mask"][row, place].bool()
            assert batch.inputs["input_ids"][row, place][own].tolist() == expected["input_ids"]
            assert batch.inputs["token_type_ids"][row, place][own].tolist() == expected["token_type_ids"]
    assert batch.labels.tolist() == ["ABCD".index(row["answer"]) for row in race_rows()]
    assert batch.groups.tolist() == [0] * 4 + [1] * 6


def test_the_loss_is_the_library_models_own():
    served = ready()
    batch = served.collate([served.rows["train"][row] for row in range(10)])
    module = MultipleChoice(SMALL).eval()
    theirs = module.net(**batch.inputs, labels=batch.labels)
    torch.testing.assert_close(module.loss(module(**batch.inputs), batch).mean(), theirs.loss)


def test_ten_questions_are_learned_and_scored_by_level():
    # The right option is that of a letter in half of the questions: a network that learns them is above chance.
    module = MultipleChoice(SMALL, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    trainer = quiet(max_epochs=25)
    trainer.fit(module, data())
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weighted = (4 * found["val/accuracy_middle"] + 6 * found["val/accuracy_high"]) / 10
    assert found["val/score"] == found["val/accuracy"] == pytest.approx(weighted)
    assert found["val/accuracy"] > 60


def test_accuracy_is_the_share_of_the_options_with_the_highest_logits():
    module = MultipleChoice(SMALL)
    (found,) = quiet().validate(module, data(eval_batch_size=3), verbose=False)
    served = ready("validate")
    batch = served.collate([served.rows["val"][row] for row in range(10)])
    with torch.no_grad():
        right = module.eval()(**batch.inputs).argmax(dim=1) == batch.labels
    assert found["val/accuracy"] == pytest.approx(100 * float(right.float().mean()))


@pytest.mark.slow
def test_the_recipe_fine_tunes_tests_and_predicts_from_what_a_masked_lm_saved(capsys):
    MaskedLM(SMALL).save_pretrained("pretrained", load_tokenizer("embedded"))
    own = [f"--data.dataset={write(race_rows())}", "--data.config_name=null", "--data.train_split=train",
           "--data.val_split=train", "--data.test_split=train", "--data.max_length=40", "--data.batch_size=4",
           *ONE_CPU]  # fmt: skip
    main(["fit", "--config", "pmi_masking/finetune_race", *own])
    command = capsys.readouterr().out.splitlines()[-1].split()[1:]
    main(command)
    assert "test/accuracy_middle" in capsys.readouterr().out
    main(["predict", *command[1:]])
    (path,) = Path().rglob("predictions.csv")
    with path.open(newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == {row["example_id"] for row in race_rows()}


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (None, {"article_column": "text"}, "article_column='text' is no column of train_split"),
        (changed(answer="E"), {}, r"answer of question middle0.txt \(train_split\) must be one of A, B, C, D, got 'E'"),
        (changed(options=["a"]), {}, "options of question middle0.txt .* at least 2, got 1 and 1"),
        (None, {"max_length": 8}, "max_length must leave room for an article beside question middle0.txt"),
    ],
)
def test_bad_data_are_refused_before_training(rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        ready(rows=rows, **arguments)


def test_a_network_with_another_number_of_options_is_refused():
    with pytest.raises(ValueError, match="model.num_classes must be the number of the data's options, 4, got 3"):
        quiet(max_epochs=1).fit(MultipleChoice(SMALL, num_classes=3), data())
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        MultipleChoice(SMALL, num_classes=1)
