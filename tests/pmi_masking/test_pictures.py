import csv
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure

from lightning_iclr.pmi_masking import (
    LossByUnit,
    MaskedParagraph,
    MaskedTextDataModule,
    UnitLengths,
    VocabularySettings,
    WholeWordCollator,
    load_tokenizer,
)
from lightning_iclr.pmi_masking import pictures as pictures_module
from lightning_iclr.pmi_masking.callbacks import masked_text
from lightning_iclr.pmi_masking.collator import units_by_length
from lightning_iclr.pmi_masking.pictures import (
    MaskedText,
    draw_coverage,
    draw_cross_evaluation,
    draw_loss_by_unit,
    draw_masked_paragraph,
    draw_naive_against_pmi,
    draw_ranks,
    draw_unit_lengths,
)
from tests.pmi_masking.toys import paragraphs


def drawn(figure: Figure) -> list[str]:
    """The texts of a figure's axes."""
    figure.canvas.draw()
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_a_masked_paragraph_shows_every_character_and_colours_chosen_units():
    text = MaskedText([" new", " york", " un", "real", " x"], [0, 0, 1, 1, 2], [True, True, False, False, False])
    figure = draw_masked_paragraph({"PMI": text}, width=12)
    found = figure.axes[0].texts
    assert found[0].get_text() == "PMI"
    assert "".join(letter.get_text() for letter in found[1:]) == "newyorkunrealx"
    bold = [letter.get_text() for letter in found[1:] if letter.get_fontweight() == "bold"]
    assert "".join(bold) == "newyork"
    assert {letter.get_color() for letter in found[1:8]} == {pictures_module.COLOURS[0]}
    lines = {letter.get_position()[1] for letter in found[1:]}
    assert len(lines) == 2  # "unreal x" does not fit the first
    columns = [letter.get_position()[0] for letter in found[1:]]
    assert max(columns) < 12
    assert len({letter.get_position() for letter in found[1:]}) == 14  # no two in one place


def test_a_text_as_a_masking_sees_it_has_its_pieces_units_and_budget():
    tokenizer = load_tokenizer("embedded")
    ids = tokenizer("An irreversible accomplishment of somebody, somewhere")["input_ids"]
    text = masked_text(WholeWordCollator(tokenizer), {"input_ids": ids, "row_id": 0, "epoch": 0})
    assert "".join(text.pieces).split() == ["an", "irreversible", "accomplishment", "of", "somebody", ",", "somewhere"]
    assert len(set(text.units)) == 7
    for first, second in zip(range(len(ids) - 3), range(1, len(ids) - 2), strict=True):
        assert (text.units[first] == text.units[second]) == (not text.pieces[second].startswith(" "))
    assert sum(text.chosen) == max(1, round(0.15 * (len(ids) - 2)))


def test_curves_and_bars_hold_the_numbers_that_were_given():
    figure = draw_loss_by_unit([10, 20], {"1": [5.0, 4.0], "6_or_more": [7.0, np.nan]})
    assert [line.get_ydata().tolist()[0] for line in figure.axes[0].lines] == [5.0, 7.0]
    figure = draw_coverage([10, 100], {"PMI": [0.1, 0.2]})
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx([10, 20])
    figure = draw_unit_lengths({"word": ([2, 1, 0, 1], [1, 0, 0, 1]), "PMI": ([1, 0, 3, 0], [0, 0, 1, 0])}, 0.15)
    lengths, rates = (
        [[bar.get_height() for bar in bars] for bars in axis.containers if len(bars)] for axis in figure.axes
    )
    assert lengths == [[50, 25, 0, 25], [25, 0, 75, 0]]
    assert rates[0] == [50, 0, 100]  # there is no rate where there are no units
    assert rates[1] == pytest.approx([0, 100 / 3])
    assert "33.3" in drawn(figure)


def test_pictures_of_a_vocabulary_name_its_ends_and_outliers():
    words = [f"word {number}" for number in range(20)]
    figure = draw_ranks({2: np.linspace(9, 1, 20), 3: np.linspace(5, 2, 20)}, {2: words, 3: words}, examples=3)
    assert {"word 0", "word 19"} <= set(drawn(figure))
    pmi = np.ones(20)
    naive = np.where(np.arange(20) == 7, 9.0, 1.0)
    assert drawn(draw_naive_against_pmi(naive, pmi, words, 3, outliers=1)) == ["word 7"]
    naive[8], naive[9] = 8.5, 3.0  # beside the one before, and away from it
    assert drawn(draw_naive_against_pmi(naive, pmi, words, 3, outliers=2)) == ["word 7", "word 9"]


def test_the_cross_evaluation_marks_the_best_of_each_column():
    figure = draw_cross_evaluation([[1.0, 4.0], [2.0, 3.0]], ["token", "PMI"], ["token", "PMI"])
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"]
    assert bold == ["1.00", "3.00"]


def test_the_losses_by_unit_are_kept_in_checkpoints():
    callback, other = LossByUnit(), LossByUnit()
    callback.steps, callback.losses = [10, 20], {"1": [3.0, 2.0]}
    other.load_state_dict(callback.state_dict())
    assert (other.steps, other.losses) == (callback.steps, callback.losses)


class Idle(LightningModule):
    def training_step(self, batch, batch_idx):
        return None

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned .None|.*training_step.*returned .None")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("masking", ["pmi", "whole_word", "random_token", "random_span"])
def test_the_rates_of_the_runs_own_masking_are_drawn_and_logged(masking, tmp_path):
    texts = Dataset.from_dict({"text": paragraphs()[:80]})
    data = MaskedTextDataModule(
        DatasetDict({"train": texts, "validation": texts}), masking=masking, tokenizer="embedded", sequence_length=64,
        vocabulary_settings=VocabularySettings(size=40, min_count=2, proportions=(1.0,)), cache_dir=tmp_path / "cache",
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, limit_train_batches=1, limit_val_batches=0,
        logger=CSVLogger(tmp_path), callbacks=[UnitLengths(rows=50, longest=4)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, max_epochs=1,
    )  # fmt: skip
    trainer.fit(Idle(), data)
    folder = Path(trainer.log_dir)
    assert (folder / "figures" / "unit_lengths.png").is_file()
    logged = {}
    if (folder / "metrics.csv").is_file():
        with (folder / "metrics.csv").open() as file:
            cells = [cell for row in csv.DictReader(file) for cell in row.items()]
        logged = {name: float(value) for name, value in cells if "units" in name}
    there, chosen = units_by_length(data.collator, [data.rows["train"][row] for row in range(50)], longest=4)
    expected = {f"units/chosen_{n}": chosen[n - 1] / there[n - 1] for n in range(1, 5) if there[n - 1]}
    assert logged == (pytest.approx(expected) if masking != "random_span" else {})


@pytest.mark.parametrize(
    ("callback", "name"), [(MaskedParagraph, "tokens"), (UnitLengths, "rows"), (UnitLengths, "longest")]
)
def test_a_picture_of_nothing_is_refused(callback, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        callback(**{name: 0})
