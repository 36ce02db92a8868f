"""Figures: what is drawn is what was recorded, and the bytes are the same each time."""

import hashlib
import math
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

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


def test_many_rows_have_as_many_colours(sweep):
    trials = sweep.trials.assign(row=[f"row {i}" for i in range(9)], row_index=range(9))
    handles = figures.curves(replace(sweep, trials=trials)).legends[0].legend_handles
    colors = {handle.get_color() for handle in handles if handle.get_label().startswith("row")}
    assert len(colors) == 9


def test_the_factor_map_shows_the_means_of_rows_and_references(sweep):
    axes = figures.factors(sweep).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][-2:] == ["untrained network", "raw pixels"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["class", "colour", "shape", "texture"]
    shown = [text.get_text() for text in axes.texts]
    assert shown[:4] == ["79", "79", "35", "35"]
    assert shown[-4:] == ["62", "70", "32", "24"]


def test_the_same_frames_give_the_same_bytes_whatever_the_users_style(sweep):
    def drawn():
        figure = figures.curves(sweep)
        return {form: hashlib.sha256(figures.render(figure, form)).hexdigest() for form in figures.FORMATS}

    plain = drawn()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 50, "svg.hashsalt": "x"}):
        assert drawn() == plain
