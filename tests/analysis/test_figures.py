"""Figures: what is drawn is what was recorded, and the bytes are the same each time."""

import hashlib
import math
from dataclasses import replace
from itertools import combinations

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from analysis import figures

ENTROPY, KL, KNN = 0, 1, 2


def lines(figure, axes, color):
    """Step and value of each line of a colour."""
    return [
        (np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float), line)
        for line in figure.axes[axes].lines
        if to_hex(line.get_color()).upper() == color
    ]


def test_a_line_is_the_mean_over_finished_trials(sweep, recorded):
    figure = figures.curves(sweep)
    for axes, metric in ((ENTROPY, "train/teacher_entropy"), (KL, "train/kl"), (KNN, "eval/knn_top1")):
        steps, means, _ = lines(figure, axes, figures.OKABE_ITO[0])[0]
        wanted = [np.mean([recorded("both", seed, int(step))[metric] for seed in (0, 1)]) for step in steps]
        np.testing.assert_allclose(means, wanted)
        assert steps[-1] == 800


def test_the_band_is_the_range_over_finished_trials(sweep, recorded):
    band = figures.curves(sweep).axes[KL].collections[2].get_paths()[0].vertices
    at_step = band[band[:, 0] == 100, 1]
    values = [recorded("sharpening only", seed, 100)["train/kl"] for seed in range(3)]
    assert at_step.min() == pytest.approx(min(values))
    assert at_step.max() == pytest.approx(max(values))


def test_a_diverged_trial_is_its_own_line_and_ends_with_a_cross(sweep):
    drawn = lines(figures.curves(sweep), ENTROPY, figures.OKABE_ITO[1])
    assert any(steps[-1] == 100 and len(steps) == 5 for steps, _, _ in drawn)
    assert [steps.tolist() for steps, _, line in drawn if line.get_marker() == "x"] == [[100]]


def test_the_onset_is_marked_on_the_line_of_its_row(sweep):
    figure = figures.curves(sweep)
    for color, onset in ((figures.OKABE_ITO[1], 130), (figures.OKABE_ITO[2], 80)):
        drawn = lines(figure, ENTROPY, color)
        (marker,) = [(steps, values) for steps, values, line in drawn if line.get_marker() == "v"]
        assert marker[0].tolist() == [onset]
        assert marker[1][0] == pytest.approx(np.interp(onset, drawn[0][0], drawn[0][1]))
    assert not [line for *_, line in lines(figure, ENTROPY, figures.OKABE_ITO[0]) if line.get_marker() == "v"]


def test_uniform_and_raw_pixels_are_levels(sweep):
    figure = figures.curves(sweep)
    levels = {
        axes: [line.get_ydata()[0] for line in figure.axes[axes].lines if list(line.get_xdata()) == [0, 1]]
        for axes in (ENTROPY, KL, KNN)
    }
    assert levels == {ENTROPY: [math.log(256)], KL: [], KNN: [61.5]}


def test_a_level_of_uniform_is_drawn_of_prototypes_alone(sweep):
    """A trial without targets has outputs of some dimension, and a head may be narrower than its prototypes."""
    trials = sweep.trials.copy()
    vectors, prototypes = trials["row"] == "both", trials["row"] == "centring only"
    trials.loc[vectors, "train/teacher_entropy_fraction"] = math.nan
    trials.loc[vectors, "param:method.head.out_dim"] = 64.0
    trials["param:method.prototypes_number"] = pd.Series(1000.0, index=trials.index).where(prototypes)
    figure = figures.curves(replace(sweep, trials=trials))
    levels = [line.get_ydata()[0] for line in figure.axes[ENTROPY].lines if list(line.get_xdata()) == [0, 1]]
    assert levels == [math.log(256), math.log(1000)]


def test_a_metric_without_records_leaves_its_panel_empty(sweep):
    without = sweep.curves[sweep.curves["metric"] != "train/kl"]
    figure = figures.curves(replace(sweep, curves=without))
    assert figures.render(figure, "png")
    assert not [line for line in figure.axes[KL].lines if len(line.get_xdata())]


def test_data_without_labels_leave_the_panel_of_knn_empty(unlabelled):
    figure = figures.curves(unlabelled)
    assert figures.render(figure, "png")
    assert not [line for line in figure.axes[KNN].lines if len(line.get_xdata())]
    assert lines(figure, ENTROPY, figures.OKABE_ITO[0])


def test_many_rows_have_as_many_colours(sweep):
    trials = sweep.trials.assign(row=[f"row {i}" for i in range(9)], row_index=range(9))
    handles = figures.curves(replace(sweep, trials=trials)).legends[0].legend_handles
    colors = {handle.get_color() for handle in handles if handle.get_label().startswith("row")}
    assert len(colors) == 9


def test_the_factor_map_shows_the_means_of_rows_and_references(sweep):
    axes = figures.factors(sweep).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][-2:] == ["untrained network", "raw pixels"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["colour", "shape", "texture"]
    shown = [text.get_text() for text in axes.texts]
    assert shown[:3] == ["79", "35", "35"]
    assert shown[-3:] == ["70", "32", "24"]


def panel(axes):
    """The numbers in the cells of a map, its letters row by row, and its limits."""
    (image,) = axes.images
    letters = [text.get_text() for text in axes.texts]
    width = image.get_array().shape[1]
    return (
        image.get_array().filled(np.nan),
        list(map(list, zip(*[iter(letters)] * width, strict=True))),
        image.get_clim(),
    )


def test_the_second_map_shows_the_difference_from_the_baseline_row_with_the_same_seed(sweep, recorded):
    left, right = figures.factors(sweep).axes[:2]
    numbers, letters, limits = panel(right)
    wanted = [
        [
            np.mean([recorded(row, seed, 800)[name] - recorded("both", seed, 800)[name] for seed in seeds])
            for name in ("factor/knn_top1_colour", "factor/knn_top1_shape", "factor/knn_top1_texture")
        ]
        # Seed 1 of "centring only" diverged, and seed 2 of "both" never ran.
        for row, seeds in (("centring only", [0]), ("sharpening only", [0, 1]))
    ]
    assert np.isnan(numbers[0]).all()
    np.testing.assert_allclose(numbers[1:], wanted)
    assert letters == [["–", "–", "–"], ["−44", "−18", "−18"], ["−51", "−21", "−21"]]
    assert limits == (-52, 52)
    assert [label.get_text() for label in right.get_xticklabels()] == ["colour", "shape", "texture"]
    assert not right.get_yticklabels()
    assert right.get_ylim() == left.get_ylim() == (4.5, -0.5)


def test_small_differences_are_signed_and_stay_pale(sweep):
    colour = sweep.trials["row_index"].map({0: 50.0, 1: 52.4, 2: 49.7})
    trials = sweep.trials.assign(**{f"factor/knn_top1_{name}": colour for name in ("colour", "shape", "texture")})
    _, letters, limits = panel(figures.factors(replace(sweep, trials=trials)).axes[1])
    assert letters == [["–"] * 3, ["+2"] * 3, ["0"] * 3]
    assert limits == (-10, 10)


def test_the_letters_of_a_map_stand_out_from_their_colour(sweep):
    def luminance(color):
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    knn = np.linspace(0, 100, 33)
    trials = pd.DataFrame({"trial_id": map(str, range(33)), "row": map(str, range(33)), "row_index": range(33)})
    trials = trials.assign(seed=0, state="finished", verdict="none", **{"factor/knn_top1_shape": knn})
    figure = figures.factors(replace(sweep, trials=trials, baseline_row="16"))
    for axes in figure.axes[:2]:
        (image,) = axes.images
        cells = [(text, value) for text, value in zip(axes.texts, image.get_array().ravel(), strict=True) if value]
        assert len(cells) >= 32
        for text, value in cells:
            dark, light = sorted([luminance(text.get_color()), luminance(image.to_rgba(value))])
            # That of WCAG for text.
            assert (light + 0.05) / (dark + 0.05) > 4.5


def test_one_row_has_no_difference_and_a_figure_of_one_map(sweep):
    alone = replace(sweep, trials=sweep.trials[sweep.trials["row"] == "both"])
    one, two = figures.factors(alone), figures.factors(sweep)
    assert len([axes for axes in one.axes if axes.images]) == 1
    assert len([axes for axes in two.axes if axes.images]) == 2
    assert one.get_figwidth() < 3.5 < 6.5 < two.get_figwidth() < 7


def test_raw_pixels_are_a_level_only_where_all_rows_are_judged_alike(sweep):
    def levels(trials) -> list[str]:
        knn = figures.curves(replace(sweep, trials=trials)).axes[2]
        return [text.get_text() for text in knn.texts]

    assert levels(sweep.trials) == ["raw pixels"]
    other = sweep.trials.assign(**{"param:evals.data.kind": "same"})
    other.loc[other["row"] == "sharpening only", "param:evals.data.kind"] = "digits"
    assert levels(other) == []


def test_a_factor_that_a_row_does_not_have_is_a_dash(of_two_data_sets):
    left, right = figures.factors(of_two_data_sets).axes[:2]
    assert [label.get_text() for label in left.get_xticklabels()] == ["colour", "digit", "shape", "texture"]
    _, knn, _ = panel(left)
    assert knn[:3] == [["79", "–", "35", "35"], ["35", "–", "17", "17"], ["28", "15", "–", "15"]]
    assert knn[3:] == [["36", "18", "18", "18"], ["70", "32", "32", "24"]]
    _, difference, limits = panel(right)
    assert difference == [["–"] * 4, ["−44", "–", "−18", "−18"], ["−51", "–", "–", "−21"]]
    assert limits == (-52, 52)


def test_rows_of_which_no_trial_has_finished_have_maps_of_dashes(sweep):
    figure = figures.factors(replace(sweep, trials=sweep.trials.assign(state="running")))
    for axes in figure.axes[:2]:
        _, letters, _ = panel(axes)
        assert letters[:3] == [["–"] * 3] * 3
    assert figures.render(figure, "png")


@pytest.mark.parametrize("rows_number", [3, 20])
def test_no_letters_of_the_factor_maps_overlap(sweep, rows_number):
    """Labels of rows and factors, titles, and the numbers in the cells."""
    labels = [f"without augmentation {i}" for i in range(rows_number)]
    trials = pd.concat(
        [
            sweep.trials[sweep.trials["row"] == "both"].assign(row=label, row_index=i, state="finished")
            for i, label in enumerate(labels)
        ]
    )
    for number, name in enumerate(("background", "position")):
        trials[f"factor/knn_top1_{name}"] = 10.0 + 80 * number
    figure = figures.factors(replace(sweep, trials=trials, baseline_row=labels[0]))
    figure.draw_without_rendering()
    letters = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = {text: text.get_window_extent() for text in letters}
    assert len(boxes) > 2 * 5 * rows_number
    # Boxes of slanted letters overlap where the letters do not.
    level = [text for text in letters if not text.get_rotation()]
    assert not [(a, b) for a, b in combinations(level, 2) if boxes[a].overlaps(boxes[b])]
    assert not [text for text, box in boxes.items() if figure.bbox.count_contains(box.corners()) < 4]


def test_the_same_frames_give_the_same_bytes_whatever_the_users_style(sweep):
    def drawn():
        figure = figures.curves(sweep)
        return {form: hashlib.sha256(figures.render(figure, form)).hexdigest() for form in figures.FORMATS}

    plain = drawn()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 50, "svg.hashsalt": "x"}):
        assert drawn() == plain
