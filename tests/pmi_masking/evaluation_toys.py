"""Ten rows of each task in the columns of the hub, and tiny networks, for the tests of the paper's evaluation."""

import json
from pathlib import Path

from lightning.pytorch import Trainer

SMALL = {"model_type": "bert", "vocab_size": 8000, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
NAMES = ["Rome", "Paris", "London", "Berlin", "Madrid"]
SIZES = ["small", "big", "old", "new", "rich"]


def squad_rows():
    """Return five questions with an answer and five without."""
    rows = []
    for number in range(10):
        city = NAMES[number % 5]
        context = f"{'It rains a lot there. ' * (number % 3)}The capital is {city}, a city of some size. " * 2
        answer = {"text": [city], "answer_start": [context.index(city)]}
        question = "What is the capital?" if number < 5 else "Who was the first king of the moon?"
        answers = answer if number < 5 else {"text": [], "answer_start": []}
        rows.append({"id": f"q{number}", "title": "t", "context": context, "question": question, "answers": answers})
    return rows


def race_rows():
    """Return questions of both levels, some with a blank."""
    rows = []
    for number in range(10):
        city = NAMES[number % 5]
        level = "middle" if number < 4 else "high"
        rows.append({
            "example_id": f"{level}{number}.txt",
            "article": f"The capital is {city}. " * 4,
            "answer": "ABCD"[(number % 5 - number // 5) % 5 % 4],
            "question": "The capital is _ ." if number % 2 else "What is the capital?",
            "options": [NAMES[(number // 5 + place) % 5] for place in range(4)],
        })  # fmt: skip
    return rows


def glue_rows(task):
    """Return rows of CoLA, MRPC, STS-B or MNLI."""
    texts = {"cola": ("sentence",), "mrpc": ("sentence1", "sentence2"), "stsb": ("sentence1", "sentence2"),
             "mnli": ("premise", "hypothesis")}[task]  # fmt: skip
    rows = []
    for number in range(10):
        label = number / 2 if task == "stsb" else number % {"mnli": 3}.get(task, 2)
        written = {text: f"{NAMES[number % 5]} is {SIZES[int(label)]}" for text in texts}
        rows.append({**written, "label": label, "idx": number})
    return rows


def write(rows, name="rows.jsonl"):
    """Write rows as JSON into the working folder and return the path."""
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return str(Path(name).resolve())


def quiet(**options):
    """Return a Trainer on one CPU that leaves nothing behind."""
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return Trainer(**{**defaults, **shown, **options})


# How a recipe of the evaluation is run on one CPU, two steps.
ONE_CPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_epochs=1",
           "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
           "--data.num_workers=0"]  # fmt: skip
