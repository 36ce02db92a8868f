"""Numbers of a summary against scipy, statsmodels and plain loops; nothing is dropped, missing stays missing."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from analysis import summary
from dino_lab.core.records import KNN


def trials(values: dict[str, list[float]], state: str = "finished") -> pd.DataFrame:
    """Rows of finished trials, one a seed; a nan is a trial that did not finish."""
    return pd.DataFrame(
        [
            {
                "row": row,
                "row_index": index,
                "seed": seed,
                "state": "running" if math.isnan(value) else state,
                "verdict": "none",
                "metric": 50.0 if math.isnan(value) else value,
            }
            for index, (row, column) in enumerate(values.items())
            for seed, value in enumerate(column)
        ]
    )


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_interval_is_students_t(n):
    values = np.random.default_rng(n).normal(60, 5, n)
    measured = summary.interval(pd.Series(values))
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert measured["n"] == n
    assert measured["mean"] - measured["half"] == pytest.approx(low)
    assert measured["mean"] + measured["half"] == pytest.approx(high)


def test_one_value_has_no_interval_and_none_has_no_mean():
    one = summary.interval(pd.Series([3.0, np.nan]))
    assert (one["n"], one["mean"]) == (1, 3)
    assert math.isnan(one["half"])
    none = summary.interval(pd.Series([np.nan]))
    assert none["n"] == 0
    assert math.isnan(none["mean"])


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_that_of_statsmodels(seed):
    p = pd.Series(np.random.default_rng(seed).uniform(0, 0.2, 7), index=list("abcdefg"))
    np.testing.assert_allclose(summary.holm(p), multipletests(p, method="holm")[1])


def test_holm_counts_only_the_tests_that_were_made():
    p = pd.Series([0.01, np.nan, 0.02])
    np.testing.assert_allclose(summary.holm(p), [0.02, np.nan, 0.02])


def test_paired_differences_are_those_of_the_paired_t_test():
    random = np.random.default_rng(0)
    values = {row: list(random.normal(mean, 3, 4)) for row, mean in (("base", 60), ("a", 62), ("b", 40), ("c", 60))}
    table = summary.differences(trials(values), "metric", baseline_row="base")
    tests = {row: stats.ttest_rel(values[row], values["base"]) for row in "abc"}
    for row, test in tests.items():
        assert table.loc[row, "mean"] == pytest.approx(np.mean(values[row]) - np.mean(values["base"]))
        assert table.loc[row, "p"] == pytest.approx(test.pvalue)
        interval = test.confidence_interval(0.95)
        assert table.loc[row, "half"] == pytest.approx((interval.high - interval.low) / 2)
    corrected = multipletests([test.pvalue for test in tests.values()], method="holm")[1]
    np.testing.assert_allclose(table.loc[list("abc"), "p_holm"], corrected)
    assert table.loc["base"].isna().all()


def test_a_seed_that_is_missing_in_either_row_makes_no_pair():
    nan = math.nan
    table = summary.differences(
        trials({"base": [60, 61, nan, 64], "a": [50, nan, 53, 57], "b": [nan, nan, 9, nan]}),
        "metric",
        baseline_row="base",
    )
    assert table.loc["a", ["n", "mean"]].to_list() == [2, -8.5]
    assert table.loc["a", "p"] == pytest.approx(stats.ttest_rel([50, 57], [60, 64]).pvalue)
    assert table.loc["b", "n"] == 0
    assert table.loc["b", ["mean", "p", "p_holm"]].isna().all()
    assert table.loc["a", "p_holm"] == table.loc["a", "p"]


@pytest.mark.parametrize(
    "others",
    [
        {"param:data.kind": "digits"},
        {"param:evals.data.kind": "digits"},
        {"param:data.class_factor": "shape"},
        {"param:evals.data.kind": "shapes", "param:evals.data.class_factor": "shape"},
    ],
)
def test_rows_that_are_judged_by_other_images_have_no_difference(others):
    frame = trials({"base": [1.0, 2.0], "a": [3.0, 5.0], "b": [4.0, 7.0]}).rename(columns={"metric": KNN})
    knobs = {"data.kind": "shapes", "data.class_factor": "color", "evals.data.kind": "same"}
    frame = frame.assign(**{f"param:{knob}": value for knob, value in knobs.items()})
    frame["param:evals.data.class_factor"] = None
    for knob, value in others.items():
        frame.loc[frame["row"] == "b", knob] = value
    table = summary.differences(frame, KNN, baseline_row="base")
    assert table.loc["a", "mean"] == 2.5
    assert table.loc["b", "n"] == 0
    # Of a factor, it does not matter which one is the class.
    factor = summary.differences(frame.rename(columns={KNN: "factor"}), "factor", baseline_row="base")
    assert factor.loc["b", "n"] == (2 if any("class_factor" in knob for knob in others) else 0)
    # Of trials that train on something else and are judged by the same images there is one.
    frame["param:evals.data.kind"] = "digits"
    assert summary.differences(frame, KNN, baseline_row="base").loc["b", "n"] == (
        0 if others.get("param:evals.data.class_factor") else 2
    )


@pytest.mark.parametrize(("values", "p"), [([5.0, 5.0, 5.0], math.nan), ([4.0, 4.0, 4.0], 0.0)])
def test_differences_without_spread_have_no_warning_and_the_limit_of_p(values, p):
    table = summary.differences(trials({"base": [5.0, 5.0, 5.0], "a": values}), "metric", baseline_row="base")
    assert table.loc["a", "p"] == pytest.approx(p, nan_ok=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("values", "p"), [([12.4, 10.6, 15.0], 0.0), ([12.1 + 2e-15, 10.3, 14.7], math.nan)])
def test_differences_that_are_equal_but_for_rounding_have_no_spread(values, p):
    base = [12.1, 10.3, 14.7]
    assert len({value - other for value, other in zip(values, base, strict=True)}) > 1
    table = summary.differences(trials({"base": base, "a": values}), "metric", baseline_row="base")
    assert table.loc["a", "p"] == pytest.approx(p, nan_ok=True)


def test_a_trial_that_did_not_finish_has_no_final_value():
    table = summary.means(trials({"a": [10.0, 20.0, math.nan], "b": [math.nan] * 3}), "metric")
    assert table.loc["a", ["n", "mean"]].to_list() == [2, 15]
    assert table.loc["b", "n"] == 0
    assert math.isnan(table.loc["b", "mean"])


def test_every_planned_seed_is_counted_once(sweep):
    table = summary.counts(sweep.trials)
    assert list(table.index) == ["both", "centring only", "sharpening only"]
    assert table.loc["both", ["planned", "finished", "none", "missing"]].to_list() == [3, 2, 2, 1]
    assert table.loc["centring only", ["finished", "uniform", "diverged", "missing"]].to_list() == [2, 2, 1, 0]
    assert table.loc["sharpening only", ["finished", "one_prototype"]].to_list() == [3, 3]
    assert (table[summary.COUNTS].sum(axis="columns") == table["planned"]).all()


def test_a_seed_that_was_never_started_is_missing(sweep):
    fewer = sweep.trials.drop(index=8)
    assert summary.counts(fewer).loc["sharpening only", ["planned", "finished", "missing"]].to_list() == [3, 2, 1]


def test_onsets_are_those_of_finished_trials(sweep):
    table = summary.onsets(sweep.trials)
    assert table.loc["centring only"].to_list() == [130, 120, 140]
    assert table.loc["sharpening only"].to_list() == [80, 60, 100]
    assert table.loc["both"].isna().all()


def test_collapsed_trials_count_in_the_mean_of_their_row(sweep, recorded):
    finals = [recorded("sharpening only", seed, 800)["eval/knn_top1"] for seed in range(3)]
    table = summary.means(sweep.trials, "eval/knn_top1")
    assert table.loc["sharpening only", "mean"] == pytest.approx(np.mean(finals))
    diverged_left_out = [recorded("centring only", seed, 800)["eval/knn_top1"] for seed in (0, 2)]
    assert table.loc["centring only", "mean"] == pytest.approx(np.mean(diverged_left_out))


def test_the_untrained_network_is_that_of_one_row():
    start = pd.DataFrame(
        {"trial_id": ["a0", "b0", "a1"], "step": 0, "metric": "eval/knn_top1", "value": [30.0, 34.0, 40.0]}
    )
    later = start.assign(step=10, value=90.0)
    table = pd.DataFrame({"trial_id": ["a0", "b0", "a1"], "row": ["a", "b", "a"], "seed": [0, 0, 1]})
    measured = summary.untrained(table, pd.concat([start, later]), "eval/knn_top1", row="a")
    assert measured["n"] == 2
    assert measured["mean"] == 35


def test_a_metric_that_no_trial_has_is_missing_everywhere() -> None:
    table = summary.means(trials({"a": [10.0, 20.0]}), "train/teacher_entropy")
    assert table["n"].to_list() == [0]
    assert table["mean"].isna().all()
