import io
import math

import numpy as np
import pytest

from lightning_iclr.fedopt.comparison import draw_methods, draw_rate_maps
from lightning_iclr.fedopt.pictures import (
    draw_client_evaluation,
    draw_client_updates,
    draw_effective_step,
    draw_label_matrix,
    draw_rounds,
)
from lightning_iclr.fedopt.summaries import rounds_to_target


def save(figure):
    """Lay a figure out, which raises where something does not fit."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    return figure


def texts(axis):
    return [text.get_text() for text in axis.texts]


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([0.9, 0.9, 0.9], {"target": 0.9}, 3),
        ([0.9, 0.9], {"target": 0.9}, None),
        ([1.0, 0.0, 0.0, 1.0, 1.0], {"target": 0.5}, 5),
        ([0.0, 0.0, 0.0], {"target": 0.5}, None),
        ([0.0, 0.9], {"target": 0.5, "window": 1}, 2),
        ([3.0, 2.0, 1.0, 0.0], {"target": 1.0, "lower_is_better": True}, 4),
        ([0.2, 0.9, 0.9, 0.9], {"target": 0.6, "rounds": [10, 20, 30, 40]}, 30),
        ([0.1 + 0.2, 0.3, 0.3], {"target": 0.3}, 3),
        ([math.nan, 0.9, 0.9, 0.9], {"target": 0.9}, 4),
    ],
)
def test_the_target_is_reached_when_the_mean_of_three_rounds_is_there(values, options, expected):
    assert rounds_to_target(values, **options) == expected


def test_methods_are_drawn_by_mean_and_range_with_their_rounds_to_the_target():
    yogi = np.array([[0.0, 0.6, 0.9, 0.9, 0.9], [0.2, 0.8, 0.7, 0.9, 1.0]])
    half = np.array([[0.0, 0.1, 0.2, 0.3, 0.4], [0.6, 0.7, 0.8, 0.9, 0.9]])
    curves = {"FedYogi": yogi, "FedAvg": half, "Mine": half / 2}
    axis = save(draw_methods(curves, target=0.7)).axes[0]
    lines = {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}
    # seeds reach 0.7 after rounds 4 and 4: the means of three rounds are 0.5, 0.8, 0.9 and 0.57, 0.8, 0.87
    assert list(lines) == ["FedYogi: 4 rounds", "FedAvg: 3 rounds (1 of 2 seeds)", "Mine: not reached"]
    assert lines["FedYogi: 4 rounds"].get_ydata() == pytest.approx(yogi.mean(axis=0))
    assert lines["FedYogi: 4 rounds"].get_xdata().tolist() == [1, 2, 3, 4, 5]
    edge = axis.collections[0].get_paths()[0].vertices
    for place in range(5):
        own = edge[edge[:, 0] == place + 1][:, 1]
        assert (own.min(), own.max()) == pytest.approx((yogi[:, place].min(), yogi[:, place].max()))
    dots = [line for line in axis.get_lines() if line.get_marker() == "o"]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(4, 0.7), (3, 0.7)]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True]
    assert len({line.get_color() for line in lines.values()}) == 3
    assert "target 0.7" in texts(axis)


def test_methods_need_neither_a_target_nor_several_seeds():
    axis = save(draw_methods({"FedAdam": [0.1, 0.4, 0.5]})).axes[0]
    assert [line.get_label() for line in axis.get_lines()] == ["FedAdam"]


def test_rate_maps_share_a_scale_and_frame_the_best_cell():
    one, two = np.array([[0.1, 0.2, 0.3], [0.4, np.nan, 0.6]]), np.array([[0.5, 0.9, 0.7], [0.6, 0.5, 0.5]])
    figure = save(draw_rate_maps({"FedAvg": one, "FedYogi": two}, [0.01, 0.1], [0.1, 10**-0.5, 1.0]))
    left, right, bar = figure.axes
    for axis, table in ((left, one), (right, two)):
        image = axis.images[0]
        assert np.ma.filled(image.get_array(), np.nan) == pytest.approx(table, nan_ok=True)
        assert image.get_clim() == (0.1, 0.9)
    assert texts(left) == ["10", "20", "30", "40", "\N{EN DASH}", "60"]
    assert [patch.get_xy() for patch in (left.patches[0], right.patches[0])] == [(1.5, 0.5), (0.5, -0.5)]
    minus = "\N{MINUS SIGN}"
    assert [label.get_text() for label in left.get_xticklabels()] == [f"{minus}1", f"{minus}0.5", "0"]
    assert [label.get_text() for label in left.get_yticklabels()] == [f"{minus}2", f"{minus}1"]
    assert {label.get_text() for label in right.get_yticklabels()} == {""}
    assert bar.get_ylabel() == "accuracy (%)"


def test_rate_maps_take_rates_of_each_methods_own_and_other_numbers():
    maps = {"FedAvg": [[120.0, np.nan]], "FedAdam": [[3.456, 7.0]]}
    own = {"FedAvg": [1.0, 10.0], "FedAdam": [0.001, 0.01]}
    figure = save(draw_rate_maps(maps, {"FedAvg": [0.1], "FedAdam": [1.0]}, own, metric="rounds"))
    left, right, bar = figure.axes
    assert texts(left) + texts(right) == ["120", "\N{EN DASH}", "3.46", "7"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["\N{MINUS SIGN}3", "\N{MINUS SIGN}2"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["0"]
    assert bar.get_ylabel() == "rounds"
    save(draw_rate_maps({"FedAvg": [[np.nan]]}, [0.1], [1.0]))


def test_dots_of_the_label_matrix_have_areas_like_counts_and_stay_in_their_rows():
    counts = np.zeros((100, 10), dtype=int)
    counts[3, 4], counts[99, 0] = 8, 2
    figure = save(draw_label_matrix(counts, clients=range(0, 200, 2), class_names=list("abcdefghij")))
    axis = figure.axes[0]
    dots = axis.collections[0]
    assert dots.get_offsets().tolist() == [[3, 4], [99, 0]]
    assert dots.get_sizes()[0] == pytest.approx(4 * dots.get_sizes()[1])
    assert [label.get_text() for label in axis.get_yticklabels()] == list("abcdefghij")
    assert axis.get_xticklabels()[1].get_text() == "10"
    row = axis.transData.transform([(0, 1)])[0, 1] - axis.transData.transform([(0, 0)])[0, 1]
    assert math.sqrt(dots.get_sizes()[0]) * figure.dpi / 72 <= row
    save(draw_label_matrix(np.ones((1, 62), dtype=int)))


def shares(axis):
    return np.ma.filled(axis.collections[0].get_array(), 0.0)  # (bins, rounds)


def test_each_rounds_histogram_holds_all_of_its_clients():
    rounds = np.repeat([1, 2, 3], [4, 2, 10])
    norms = np.linspace(0.1, 0.9, 16)
    cosines = np.concatenate([[-0.4, 0.9, 0.9, 0.9], [1 + 1e-9, 0.0], np.full(10, 0.5)])
    left, right, _ = save(draw_client_updates(rounds, norms, cosines)).axes
    for axis in (left, right):
        assert shares(axis).sum(axis=0) == pytest.approx([1, 1, 1])
    edges = axis.collections[0].get_coordinates()[:, 0, 1]
    assert edges[0] == pytest.approx(-0.4)
    first = shares(right)[:, 0]
    assert shares(right)[-1, 1] == 0.5  # a cosine that rounding has made larger than 1
    assert first[0] == pytest.approx(0.25)
    assert first[np.searchsorted(edges, 0.9) - 1] == pytest.approx(0.75)
    medians = next(line for line in right.get_lines() if len(line.get_xdata()) == 3)
    assert medians.get_ydata() == pytest.approx([0.9, 0.5, 0.5])
    assert medians.get_xdata().tolist() == [1, 2, 3]
    assert left.get_yscale() == "linear"
    assert left.collections[0].get_clim() == right.collections[0].get_clim() == (0, 1)


def test_many_rounds_share_columns_and_wide_norms_a_logarithmic_axis():
    rounds = np.arange(1, 1001)
    left, *_ = save(draw_client_updates(rounds, 10.0 ** (-rounds / 300), np.zeros(1000))).axes
    assert shares(left).shape == (24, 59)
    assert shares(left).sum(axis=0) == pytest.approx(np.ones(59))
    assert left.get_yscale() == "log"


@pytest.mark.parametrize("cosine", [math.nan, 0.5])
def test_a_single_update_can_be_drawn_with_or_without_a_cosine(cosine):
    left, right, _ = save(draw_client_updates([1], [0.3], [cosine])).axes
    assert shares(left).sum(axis=0) == pytest.approx([1])
    assert shares(right).sum(axis=0) == pytest.approx([0 if math.isnan(cosine) else 1])
    left, right, _ = save(draw_client_updates([1, 2], [0.0, math.nan], [cosine, cosine])).axes
    assert shares(left).sum(axis=0) == pytest.approx([1])  # the first round's alone
    assert shares(right).sum(axis=0) == pytest.approx([0] if math.isnan(cosine) else [1, 1])


def test_the_effective_step_is_a_median_within_a_band():
    rows = [[1, 0.5, 1.0, 2.0], [2, 0.25, 0.5, 4.0]]
    axis, other = save(draw_effective_step({"net.0": rows, "net.2": rows})).axes
    assert axis.get_lines()[0].get_ydata().tolist() == [1.0, 0.5]
    band = axis.collections[0].get_paths()[0].vertices
    for place, low, high in ((1, 0.5, 2.0), (2, 0.25, 4.0)):
        own = band[band[:, 0] == place][:, 1]
        assert (own.min(), own.max()) == (low, high)
    assert axis.get_yscale() == "log"
    assert other.get_title() == "net.2"
    figure = save(draw_effective_step({f"layer {i}": rows[:1] for i in range(40)}))
    assert [axis.get_title() for axis in figure.axes[::15]] == ["layer 0", "layer 39"]
    assert figure.get_suptitle().endswith("(16 of 40 layers)")


def test_rounds_mark_the_target_in_the_first_panel():
    panels = {"accuracy": {"val/accuracy": [(1, 0.2), (2, 0.7), (3, math.nan)]}, "norms": {"step": [(1, 2.0)]}}
    first, second = save(draw_rounds(panels, target=0.6, reached=2)).axes
    curve, target, reached = first.get_lines()
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([1, 2], [0.2, 0.7])
    assert list(target.get_ydata()) == [0.6, 0.6]
    assert list(reached.get_xdata()) == [2, 2]
    assert [len(axis.get_lines()) for axis in (first, second)] == [3, 1]
    assert len(save(draw_rounds({"accuracy": {"a": [(1, 0.2)]}}, target=0.6)).axes[0].get_lines()) == 2


def test_histograms_count_the_clients_that_have_a_number():
    values = {"val/accuracy": [0.1, 0.2, math.nan, 0.9], "val/loss": [1.0, 2.0, 3.0, 4.0]}
    first, second = save(draw_client_evaluation(values, {"val/loss": {"mean": 2.5, "p10": 3.7, "worst": 4.0}})).axes
    assert [sum(bar.get_height() for bar in axis.patches) for axis in (first, second)] == [3, 4]
    assert first.get_title() == "val/accuracy, 3 of 4 clients"
    assert [line.get_xdata()[0] for line in second.get_lines()] == [2.5, 3.7, 4.0]
    assert not first.get_lines()
    save(draw_client_evaluation({"val/accuracy": [math.nan]}))
