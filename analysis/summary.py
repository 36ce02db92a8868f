"""Trials -> numbers of each row: counts, verdicts, onsets, means with intervals, paired differences.

Every planned seed of a row is counted in exactly one of none and the kinds of collapse (how it finished), diverged
and missing. A collapsed trial's k-NN is a value like any other; a trial that did not finish has no final value.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from dino_lab.core.records import COLLAPSES, KNN, VERDICTS

CONFIDENCE = 0.95

COUNTS = [*VERDICTS, "missing"]
_ENDED = ("finished", "stopped")


def rows(trials: pd.DataFrame) -> list[str]:
    """Row labels in the ablation's order."""
    return list(trials.sort_values("row_index")["row"].unique())


def final(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that finished, or that their collapse stopped: the only ones whose last values are final values."""
    return trials[trials["state"].isin(_ENDED)]


def collapsed(trials: pd.DataFrame) -> pd.DataFrame:
    """Those of them that ended in a collapse."""
    finished = final(trials)
    return finished[finished["verdict"].isin(COLLAPSES)]


def counts(trials: pd.DataFrame) -> pd.DataFrame:
    """By row: planned and finished trials, finished ones by verdict, diverged and missing ones; and of the finished
    those that their collapse stopped before the others' end, and those that left a collapse before.

    Planned is the number of seeds that any row of the sweep has, so that a trial that was never started is missing.
    """
    outcome = trials["verdict"].where(trials["state"].isin(_ENDED), trials["state"])
    table = pd.crosstab(trials["row"], outcome).reindex(index=rows(trials), columns=COUNTS, fill_value=0)
    table["planned"] = trials["seed"].nunique()
    table["finished"] = table[list(VERDICTS)].sum(axis="columns") - table["diverged"]
    table["missing"] = table["planned"] - table["finished"] - table["diverged"]
    table["stopped"] = (trials["state"] == "stopped").groupby(trials["row"]).sum()
    table["left"] = ((trials["left"] != "") & trials["state"].isin(_ENDED)).groupby(trials["row"]).sum()
    return table.rename_axis(index=None, columns=None)[["planned", "finished", *COUNTS, "stopped", "left"]]


def onsets(trials: pd.DataFrame) -> pd.DataFrame:
    """By row: median and range of the step at which its finished trials began to collapse; missing if none did."""
    onset = collapsed(trials).groupby("row")["onset_step"].agg(["median", "min", "max"]).astype("Float64")
    return onset.reindex(rows(trials)).rename_axis(index=None)


def means(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """By row: n, mean and half-width of the interval of a metric's final values; n is 0 where no trial has it."""
    finished = final(trials)
    values = finished.get(metric, pd.Series(np.nan, index=finished.index))
    return _intervals({row: values[finished["row"] == row] for row in rows(trials)})


def best(trials: pd.DataFrame, curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    """By row: n, mean and half-width of each final trial's highest value over its evaluations after the start.

    Which evaluation that is was chosen on the very images that it is of: it is no result, and too high.
    """
    ended = final(trials).set_index("trial_id")["row"]
    values = curves[(curves["metric"] == metric) & (curves["step"] > 0) & curves["trial_id"].isin(ended.index)]
    highest = values.groupby("trial_id")["value"].max()
    return _intervals({row: highest[ended[highest.index] == row] for row in rows(trials)})


def differences(trials: pd.DataFrame, metric: str, *, baseline_row: str) -> pd.DataFrame:
    """By row: final value minus that of the baseline row with the same seed: n pairs, mean, half-width, p, p_holm.

    p is of the two-sided paired t-test; p_holm is corrected for all rows that have one. Seeds that finished in only
    one of the two rows make no pair, nor do trials that are judged by other images, nor those that their collapse
    stopped, which had fewer steps. The baseline row itself is missing.
    """
    values = (
        trials[trials["state"] == "finished"].pivot(index="row", columns="seed", values=metric).reindex(rows(trials))
    )
    # Which factor is the class matters to k-NN of the class alone.
    images = judged_by(trials) if metric == KNN else _images(trials)
    values[images.reindex(values.index) != images[baseline_row]] = np.nan
    pairs = values.drop(index=baseline_row) - values.loc[baseline_row]
    table = _intervals({row: pairs.loc[row] for row in pairs.index})
    table["p"] = [p_value(pairs.loc[row]) for row in pairs.index]
    table["p_holm"] = holm(table["p"])
    return table.reindex(rows(trials))


def judged_by(trials: pd.DataFrame) -> "pd.Series[str]":
    """By row: what its trials' k-NN is of, the images and which of their factors is the class."""
    return _images(trials, "classes", "class_factor")


def judged_alike(trials: pd.DataFrame) -> bool:
    """Whether k-NN of all rows is of the same images and the same class."""
    return bool(judged_by(trials).nunique() == 1)


def _images(trials: pd.DataFrame, *more: str) -> "pd.Series[str]":
    """By row: the knobs that say which images its trials are judged by, and more of that section."""
    first = trials.drop_duplicates("row").set_index("row")
    kinds = first.get("param:evals.data.kind", pd.Series("same", index=first.index))

    def said(row: str) -> str:
        section = "data" if kinds[row] == "same" else "evals.data"
        knobs = [f"param:{section}.{knob}" for knob in ("kind", "root", "path", "test_shards", *more)]
        return " ".join(str(first.at[row, knob]) for knob in knobs if knob in first)

    return pd.Series({row: said(row) for row in first.index})


def untrained(trials: pd.DataFrame, curves: pd.DataFrame, metric: str, *, row: str) -> "pd.Series[float]":
    """n, mean and half-width over seeds of a metric at step 0 of one row, since rows may differ in network and data."""
    ids = trials.loc[trials["row"] == row, "trial_id"]
    start = curves["trial_id"].isin(ids) & (curves["metric"] == metric) & (curves["step"] == 0)
    return interval(curves.loc[start, "value"])


def interval(values: "pd.Series[Any]") -> "pd.Series[float]":
    """n, mean, and half-width of Student's t interval, over what is not missing.

    The half-width is missing for n < 2. With three seeds a percentile bootstrap would cover 76 % instead of 95 %.
    """
    known = values.dropna()
    n = len(known)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * stats.sem(known) if n > 1 else np.nan
    return pd.Series({"n": n, "mean": known.mean(), "half": half})


def _intervals(values: "dict[str, pd.Series[Any]]") -> pd.DataFrame:
    return pd.DataFrame(map(interval, values.values()), index=list(values), columns=["n", "mean", "half"])


def p_value(differences: "pd.Series[Any]") -> float:
    """Of the two-sided paired t-test; missing for fewer than two pairs, or if all differences are 0."""
    # Equal differences of percentages may differ in their last bits.
    known = differences.dropna().round(9)
    if len(known) < 2 or not known.any():
        return np.nan
    if known.nunique() == 1:
        return 0.0
    return float(stats.ttest_1samp(known, 0).pvalue)


def holm(p: "pd.Series[float]") -> "pd.Series[float]":
    """Holm's step-down correction over the p values that are not missing."""
    known = p.dropna().sort_values()
    factors = np.arange(len(known), 0, -1)
    return (known * factors).cummax().clip(upper=1).reindex(p.index)
