import numpy as np
import pytest
from matplotlib.figure import Figure

from lightning_iclr.pmi_masking import LossByUnit, MaskedParagraph, WholeWordCollator, load_tokenizer
from lightning_iclr.pmi_masking import pictures as pictures_module
from lightning_iclr.pmi_masking.callbacks import masked_text
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
    figure = draw_unit_lengths({"word": [1, 1, 2, 30], "PMI": [1, 3, 3, 3]})
    heights = [[bar.get_height() for bar in bars] for bars in figure.axes[0].containers]
    assert heights[0][:3] == [50, 25, 0]
    assert heights[0][-1] == 25  # the last bar is of ten or more
    assert heights[1][2] == 75


def test_pictures_of_a_vocabulary_name_its_ends_and_outliers():
    words = [f"word {number}" for number in range(20)]
    figure = draw_ranks({2: np.linspace(9, 1, 20), 3: np.linspace(5, 2, 20)}, {2: words, 3: words}, examples=3)
    assert {"word 0", "word 19"} <= set(drawn(figure))
    pmi = np.ones(20)
    naive = np.where(np.arange(20) == 7, 9.0, 1.0)
    assert drawn(draw_naive_against_pmi(naive, pmi, words, 3, outliers=1)) == ["word 7"]


def test_the_cross_evaluation_marks_the_best_of_each_column():
    figure = draw_cross_evaluation([[1.0, 4.0], [2.0, 3.0]], ["token", "PMI"], ["token", "PMI"])
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"]
    assert bold == ["1.00", "3.00"]


def test_the_losses_by_unit_are_kept_in_checkpoints():
    callback, other = LossByUnit(), LossByUnit()
    callback.steps, callback.losses = [10, 20], {"1": [3.0, 2.0]}
    other.load_state_dict(callback.state_dict())
    assert (other.steps, other.losses) == (callback.steps, callback.losses)


def test_a_paragraph_must_have_tokens():
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        MaskedParagraph(tokens=0)
