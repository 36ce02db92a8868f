"""The phase diagram: what its cells hold, and that the same records draw the same bytes."""

from dataclasses import replace

import pandas as pd
import pytest

from analysis import figures, phase
from analysis.records import Sweep
from dino_lab.core.records import KNN, VERDICTS

LEVELS = {"momentum": [0.98, 0.9], "center": [0.9, 0.0], "temp": [0.04, 0.02, 0.1]}


def grid(sweep: Sweep, axes: dict[str, list[float]], seeds: int = 1) -> Sweep:
    """A sweep over every combination of levels; the hotter the earlier uniform, 0.02 stays alive."""
    index = pd.MultiIndex.from_product([*axes.values(), range(seeds)], names=[*axes, "seed"])
    trials = index.to_frame(index=False)
    uniform = trials["temp"] > 0.03
    trials = trials.rename(columns={axis: f"level:{axis}" for axis in axes}).assign(
        trial_id=[f"{i:010}" for i in range(len(trials))],
        row=[str(i // seeds) for i in range(len(trials))],
        row_index=[i // seeds for i in range(len(trials))],
        state="finished",
        verdict=["uniform" if each else "none" for each in uniform],
        onset_step=pd.array(
            [round(4 / temp) if each else None for temp, each in zip(trials["temp"], uniform, strict=True)], "Int64"
        ),
        left="",
        **{KNN: 50.0 + 1000 * trials["temp"]},
    )
    for axis in axes:
        trials[f"level:{axis}"] = trials[f"level:{axis}"].astype(str)  # as they are read
    return replace(sweep, trials=trials)


def test_a_cell_has_what_its_trial_became(sweep):
    table = phase.cells(grid(sweep, LEVELS)).set_index([*LEVELS])
    assert len(table) == 12
    hot, cold = table.loc[(0.98, 0.9, 0.1)], table.loc[(0.9, 0.0, 0.02)]
    assert (hot["verdict"], hot["onset"]) == ("uniform", 40)
    assert cold["verdict"] == "none"
    assert pd.isna(cold["onset"])
    assert cold["knn"] == 70


def test_of_several_seeds_the_most_decide_and_of_equals_the_worse(sweep):
    of_three = grid(sweep, LEVELS, seeds=3)
    of_three.trials.loc[[0, 1], "verdict"] = ["none", "constant"]
    of_three.trials.loc[1, "onset_step"] = 7
    first = phase.cells(of_three).iloc[0]
    assert (first["verdict"], first["alike"], first["ended"]) == ("constant", 1, 3)
    assert first["onset"] == 7
    of_three.trials.loc[1, "verdict"] = "uniform"
    assert phase.cells(of_three).iloc[0][["verdict", "alike", "onset"]].to_list() == ["uniform", 2, 53.5]


def test_what_has_not_ended_is_missing_and_what_diverged_is_told(sweep):
    unfinished = grid(sweep, LEVELS)
    unfinished.trials.loc[0, "state"] = "running"
    unfinished.trials.loc[1, ["state", "verdict"]] = ["diverged", "diverged"]
    unfinished.trials.loc[2, "state"] = "stopped"
    verdicts = phase.cells(unfinished)["verdict"].to_list()
    assert pd.isna(verdicts[0])
    assert verdicts[1:3] == ["diverged", "uniform"]
    assert "–" in [text.get_text() for axes in phase.figure(unfinished).axes for text in axes.texts]


@pytest.mark.parametrize(
    "axes", [{"temp": [0.04, 0.02]}, {**LEVELS, "more": [1.0, 2.0]}, {"temp": [0.1], "center": [0.0, 0.9]}]
)
def test_other_grids_have_no_diagram(sweep, axes):
    assert phase.figure(grid(sweep, axes)) is None


def test_words_for_levels_and_missing_cells_have_no_diagram(sweep):
    words, holes = grid(sweep, LEVELS), grid(sweep, LEVELS)
    words.trials.loc[:, "level:center"] = words.trials["level:center"].replace("0.0", "none")
    assert phase.figure(words) is None
    assert phase.figure(replace(holes, trials=holes.trials.drop(index=3))) is None
    assert phase.figure(sweep) is None


@pytest.mark.parametrize("axes", [LEVELS, {"center": [0.9, 0.0], "temp": [0.04, 0.02, 0.1]}])
def test_the_same_records_draw_the_same_bytes(sweep, axes):
    one, other = (figures.render(phase.figure(grid(sweep, axes)), "svg") for _ in range(2))
    assert one == other
    assert len(phase.figure(grid(sweep, axes)).axes) == (2 if axes is LEVELS else 1)


def test_cells_are_coloured_by_verdict_and_say_when_or_how_good(sweep):
    (axes,) = phase.figure(grid(sweep, {"center": [0.9, 0.0], "temp": [0.04, 0.02, 0.1]})).axes
    assert [text.get_text() for text in axes.texts[:3]] == ["step 100", "70 %", "step 40"]
    colors = [patch.get_facecolor() for patch in axes.patches[:3]]
    assert colors[0] == colors[2] != colors[1]
    # The coldest on the left, the quickest centre at the foot.
    assert axes.texts[1].get_position() == (0, 1)


def test_every_verdict_has_a_colour_of_its_own():
    assert phase.COLORS.keys() == VERDICTS.keys()
    assert len(set(phase.COLORS.values())) == len(VERDICTS)
