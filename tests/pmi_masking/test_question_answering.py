import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from lightning_iclr.__main__ import main
from lightning_iclr.pmi_masking import AnswerWriter, MaskedLM, QuestionAnsweringDataModule, SpanQuestionAnswering
from lightning_iclr.pmi_masking.tokenizers import load_tokenizer
from tests.distributed import Ranks, run_distributed
from tests.pmi_masking.evaluation_toys import ONE_CPU, SMALL, quiet, squad_rows, write
from tests.pmi_masking.toys import make_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]
PARTS = {"train_split": "train", "val_split": "train", "test_split": "train", "batch_size": 4}


def data(rows=None, **more):
    path = write(squad_rows() if rows is None else rows)
    settings = {"tokenizer": "embedded", "max_length": 40, "document_stride": 8, **PARTS, **more}
    return QuestionAnsweringDataModule(path, **settings)


def ready(stage="fit", **more):
    served = data(**more)
    served.prepare_data()
    served.setup(stage)
    return served


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def test_ten_rows_are_learned_and_their_answers_written():
    module, rows = SpanQuestionAnswering(SMALL, optimizer=adam, null_threshold=None), squad_rows()
    trainer = quiet(max_epochs=15)
    trainer.fit(module, data())
    metrics = trainer.callback_metrics
    for name in ("exact", "f1", "f1_has_answer", "exact_no_answer", "best_f1", "score"):
        assert metrics[f"val/{name}"] == 100
    assert module.threshold == pytest.approx(float(metrics["val/best_f1_threshold"]))
    (tested,) = quiet().test(module, data(), verbose=False)
    assert tested["test/f1"] == 100
    quiet(callbacks=[AnswerWriter()]).predict(module, data(), return_predictions=False)
    found = json.loads(Path("predictions.json").read_text())
    assert found == {row["id"]: "".join(row["answers"]["text"]) for row in rows}
    odds = json.loads(Path("null_odds.json").read_text())
    assert all((odds[row["id"]] > module.threshold) == (not row["answers"]["text"]) for row in rows)


def test_the_recipe_fine_tunes_tests_and_predicts_from_what_a_masked_lm_saved(capsys):
    MaskedLM(SMALL).save_pretrained("pretrained", load_tokenizer("embedded"))
    path = write(squad_rows())
    own = [f"--data.dataset={path}", "--data.train_split=train", "--data.val_split=train", "--data.test_split=train",
           "--data.max_length=40", "--data.document_stride=8", "--data.batch_size=4", *ONE_CPU]  # fmt: skip
    main(["fit", "--config", "pmi_masking/finetune_squad2", *own])
    command = capsys.readouterr().out.splitlines()[-1].split()[1:]
    main(command)
    assert "test/best_f1" in capsys.readouterr().out
    main(["predict", *command[1:]])
    (found,) = Path().rglob("predictions.json")
    assert json.loads(found.read_text()).keys() == {row["id"] for row in squad_rows()}


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram"])
def test_any_fast_tokenizer_serves_answers_that_are_in_the_text(kind):
    served = ready(tokenizer=make_tokenizer(kind))
    batch = next(iter(served.val_dataloader()))
    for row, (first, last), null, offsets in zip(*batch[5:], *batch[1:4], strict=False):
        if first != null:
            text = squad_rows()[row]["context"][offsets[first, 0] : offsets[last, 1]].strip()
            assert squad_rows()[row]["answers"]["text"][0] in text
    assert (batch.positions != batch.null[:, None]).any()


def test_the_loss_is_the_library_models_own():
    served = ready()
    batch = next(iter(served.val_dataloader()))
    module = SpanQuestionAnswering(SMALL).eval()
    theirs = module.net(**batch.inputs, start_positions=batch.positions[:, 0], end_positions=batch.positions[:, 1])
    torch.testing.assert_close(module.loss(module(**batch.inputs), batch).mean(), theirs.loss)


def test_what_is_saved_loads_with_equal_logits():
    served = ready()
    batch = next(iter(served.val_dataloader()))
    module = SpanQuestionAnswering(SMALL).eval()
    module.save_pretrained("saved", served.tokenizer)
    theirs = AutoModelForQuestionAnswering.from_pretrained("saved").eval()(**batch.inputs)
    torch.testing.assert_close(module(**batch.inputs)[..., 0], theirs.start_logits, rtol=0, atol=0)


def _validate_and_predict(path, weights):
    module = SpanQuestionAnswering(SMALL, null_threshold=None)
    module.load_state_dict(torch.load(weights, weights_only=True))
    parts = {**PARTS, "val_split": "train[:9]", "test_split": None, "eval_batch_size": 3}
    settings = {"tokenizer": "embedded", "max_length": 40, "document_stride": 8, **parts}
    served = QuestionAnsweringDataModule(path, **settings)
    ranks = {"strategy": "ddp", "plugins": [Ranks()], "devices": 2} if torch.distributed.is_initialized() else {}
    (found,) = quiet(**ranks).validate(module, served, verbose=False)
    quiet(**ranks, callbacks=[AnswerWriter()]).predict(module, served, return_predictions=False)
    return found, json.loads(Path("null_odds.json").read_text())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_score_and_answer_as_one():
    path = write(squad_rows())
    torch.save(SpanQuestionAnswering(SMALL).state_dict(), "weights.pt")
    weights = str(Path("weights.pt").resolve())
    served = ready("validate", eval_batch_size=3, val_split="train[:9]")
    assert len(served.rows["val"]) % 2  # a window fills up the second process's share
    one = _validate_and_predict(path, weights)
    for found, odds in run_distributed(_validate_and_predict, path, weights):
        assert found == pytest.approx(one[0], nan_ok=True)
        assert odds == pytest.approx(one[1])


def changed(**columns):
    rows = squad_rows()
    rows[0] |= columns
    return rows


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (None, {"context_column": "text"}, "context_column='text' is no column of train_split, which has: id, title"),
        (changed(answers={"text": ["Rome"], "answer_start": [3]}), {}, "answers of question q0 .* got 'Rome' at 3"),
        (None, {"max_length": 14}, "max_length must hold document_stride tokens .* got 14 for 8"),
        (None, {"document_stride": 0}, "document_stride must be at least 1, got 0"),
        (None, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (None, {"val_split": "dev"}, "val_split='dev' is no split of this dataset, which has: train"),
    ],
)
def test_bad_data_are_refused_before_training(rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        ready(rows=rows, **arguments)


def test_a_test_needs_a_test_part():
    served = ready(None, test_split=None)
    with pytest.raises(ValueError, match="test_split must name a part of the data to test on, got None"):
        served.test_dataloader()
    assert len(served.predict_dataloader().dataset) == len(served.val_dataloader().dataset)


def test_an_answer_has_at_least_a_token():
    with pytest.raises(ValueError, match="max_answer_length must be at least 1, got 0"):
        SpanQuestionAnswering(SMALL, max_answer_length=0)
