"""One sweep as two tidy frames, `trials` and `curves`: the same from each kind of store (`stores`)."""

import json
import math
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa

from analysis import stores
from dino_lab.core import records as names
from dino_lab.tracking_uri import without_password

STATES = ("waiting", "running", "interrupted", "finished", "stopped", "diverged", "pruned", "failed")
SEARCH_STATES = ("RUNNING", "COMPLETE", "PRUNED", "FAIL")
"""Optuna's."""

CURVES = (names.TEACHER_ENTROPY, names.ENTROPY_FRACTION, names.KL, names.KNN, names.PIXELS_KNN)
"""Metrics whose whole course is read, beside all evaluations; of the others `trials` holds the last value."""

_EVALUATIONS = ("eval/", "factor/")


@dataclass(frozen=True)
class Search:
    """What a search was asked for, and what of it could not be tried."""

    space: dict[str, dict[str, Any]]
    """By name, the distribution as Optuna writes it in JSON."""
    objectives: list[str]
    options: dict[str, Any]
    """Sampler, pruner, seed, and the budget in trials and hours."""
    fixed: dict[str, Any]
    """Knobs set for every trial."""
    refused_number: int
    refused: list[dict[str, Any]]
    """Row, suggestion and error of the first suggestions whose settings did not go together."""


@dataclass(frozen=True)
class Sweep:
    """The trials of one ablation, or one search, under one baseline and one set of overrides.

    `trials` has a row a trial, in every state: trial_id, run_id, row, row_index, seed, state, verdict, onset_step, left
    (collapses that were called and taken back, as text; empty if there were none),
    `level:<axis>`, `param:<knob>` and, under its own name, the last value of each metric. `curves` has a row a value:
    trial_id, step, metric, value.

    Of a search `trials` also has what Optuna knows: search_state, seeded (taken over from another experiment),
    `told:<objective>`, and as JSON suggested (by name) and changes (by knob).
    """

    name: str
    baseline: str
    overrides: dict[str, Any]
    note: str
    """Markdown: the experiment's question, expectation and source."""
    baseline_row: str
    """Label of the row that the others are compared with."""
    published: str
    """Study in the published numbers; empty if there is none."""
    paper_rows: dict[str, str]
    """The study's name of a row, where the row's label is another."""
    trials: pd.DataFrame
    curves: pd.DataFrame
    search: Search | None = None

    @property
    def title(self) -> str:
        """What was run: ablation, baseline and overrides."""
        changes = [f"{knob}={plain(value)}" for knob, value in self.overrides.items()]
        return ", ".join([f"{self.name} on {self.baseline}", *changes])

    @property
    def options(self) -> list[str]:
        """The options of the command that runs it, one knob each."""
        return _options(self.baseline, self.overrides)


def read(
    lab: Path,
    name: str,
    *,
    baseline: str,
    overrides: Mapping[str, Any],
    asked: Collection[tuple[str, str]] | None = None,
    tracking_uri: str | None = None,
) -> Sweep:
    """The records of ablation `name`: of these rows and trials if given, otherwise of all.

    A lab keeps what an ablation asked before its file or its baseline was changed; `asked` tells what it asks now: the
    row and the id of each trial.

    Args:
        tracking_uri: where the run mirrored them: sqlite:///, postgresql://, or an MLflow server; None for the lab's
            own store.

    Raises:
        LookupError: the store, the ablation, or that baseline with those overrides has no records; says what has.
        ValueError: the URI names no store; or a record is not what it can be, and every bad cell is named.
    """
    place = without_password(tracking_uri, tracking_uri) if tracking_uri else "this lab"
    with stores.opened(lab, tracking_uri) as store:
        parent, tags = _parent(store.parents(), name, baseline, overrides, place)
        search = _search(tags)
        run_tags, params, metrics = store.children(parent)
        if metrics.empty:
            raise LookupError("none of its trials has a record yet")
        whole = metrics["key"].isin(CURVES) | metrics["key"].str.startswith(_EVALUATIONS)
        histories = store.histories(metrics[whole])
    wide_tags = _wide(run_tags)
    trials = _trials(wide_tags, params, metrics, search)
    curves = _curves(histories, wide_tags["dino_lab.trial_id"])
    if asked is not None:
        kept = [(trial.row, trial.trial_id) in asked for trial in trials.itertuples()]
        trials = trials[kept].reset_index(drop=True)
        curves = curves[curves["trial_id"].isin(trials["trial_id"])].reset_index(drop=True)
        if trials.empty:
            raise LookupError(f"no records of {name} as it is now: it or its baseline was changed after it ran")
    check(trials, curves)
    return Sweep(
        name=name,
        baseline=baseline,
        overrides=dict(sorted(overrides.items())),
        note=tags["mlflow.note.content"],
        baseline_row=tags["dino_lab.baseline_row"],
        published=tags["dino_lab.published"],
        paper_rows=json.loads(tags.get("dino_lab.paper_rows", "{}")),
        trials=trials,
        curves=curves,
        search=search,
    )


def check(trials: pd.DataFrame, curves: pd.DataFrame) -> None:
    """Raises a ValueError that names every cell that no trial can have written."""
    percent = pa.Column(float, pa.Check.in_range(0, 100), nullable=True, required=False, regex=True)
    fraction = pa.Column(float, pa.Check.in_range(-1e-4, 1 + 1e-4), nullable=True, required=False)
    per_trial = pa.DataFrameSchema(
        {
            "trial_id": pa.Column(str),
            "row": pa.Column(str),
            "row_index": pa.Column(int, pa.Check.ge(0)),
            "seed": pa.Column(int, pa.Check.ge(0)),
            "state": pa.Column(str, pa.Check.isin(STATES)),
            "verdict": pa.Column(str, pa.Check.isin([*names.VERDICTS]), nullable=True),
            "onset_step": pa.Column("Int64", pa.Check.ge(0), nullable=True),
            "search_state": pa.Column(str, pa.Check.isin(SEARCH_STATES), required=False),
            names.ENTROPY_FRACTION: fraction,
            "^(eval|factor)/.*knn_top1": percent,
        },
        unique=["row", "seed"],
    )
    per_value = pa.DataFrameSchema(
        {"trial_id": pa.Column(str), "step": pa.Column(int, pa.Check.ge(0)), "metric": pa.Column(str)}
    )
    complaints = []
    for frame, schema in ((trials, per_trial), (curves, per_value)):
        try:
            schema.validate(frame, lazy=True)
        except pa.errors.SchemaErrors as errors:
            complaints += [_complaint(frame, case) for case in errors.failure_cases.itertuples()]
    if complaints:
        raise ValueError("these records cannot be right:\n" + "\n".join(dict.fromkeys(complaints)))


def _complaint(frame: pd.DataFrame, case: Any) -> str:
    if pd.isna(case.index):
        return f"{case.column}: {case.check}: {case.failure_case}"
    record = frame.loc[case.index]
    if case.check == "multiple_fields_uniqueness":
        twice = f"trial {record.trial_id}: not the only one of row {record.row!r} with seed {record.seed}"
        return f"{twice}; the experiment or its baseline was changed after one of them ran"
    return f"trial {record.trial_id}: {case.column} is {case.failure_case!r}, not {case.check}"


def _parent(
    tags: pd.DataFrame, name: str, baseline: str, overrides: Mapping[str, Any], place: str
) -> tuple[str, dict[str, str]]:
    """Run id and tags of the parent run."""
    if name not in set(tags["experiment"]):
        known = ", ".join(sorted(set(tags["experiment"]))) or "none"
        raise LookupError(f"no records of {name!r} in {place}; with records: {known}")
    found: list[str] = []
    # The newest first: a search whose space was changed has several.
    for run_id, group in reversed([*tags[tags["experiment"] == name].groupby("run_id", sort=False)]):
        values = dict(zip(group["key"], group["value"], strict=True))
        changes = json.loads(values["dino_lab.overrides"])
        if (values["dino_lab.baseline"], changes) == (baseline, dict(overrides)):
            return str(run_id), values
        found.insert(0, " ".join(_options(values["dino_lab.baseline"], changes)))
    asked = " ".join(_options(baseline, overrides))
    raise LookupError(f"no records of {name} with {asked}; with records: {'; '.join(found)}")


def _search(tags: Mapping[str, str]) -> Search | None:
    """None of an ablation."""
    if "dino_lab.space" not in tags:
        return None
    said = {key: json.loads(tags[f"dino_lab.{key}"]) for key in ("space", "objectives", "search", "fixed", "refused")}
    return Search(
        space=said["space"],
        objectives=said["objectives"],
        options=said["search"],
        fixed=said["fixed"],
        refused_number=said["refused"]["number"],
        refused=said["refused"]["first"],
    )


def _options(baseline: str, overrides: Mapping[str, Any]) -> list[str]:
    changes = [f"--set {shlex.quote(f'{knob}={plain(value)}')}" for knob, value in sorted(overrides.items())]
    return [f"--baseline {baseline}", *changes]


def plain(value: Any) -> str:
    """As it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _trials(tags: pd.DataFrame, params: pd.DataFrame, metrics: pd.DataFrame, search: Search | None) -> pd.DataFrame:
    trials = pd.DataFrame(
        {
            "trial_id": tags["dino_lab.trial_id"],
            "run_id": tags.index,
            "row": tags["dino_lab.row"],
            "row_index": tags["dino_lab.row_index"].astype(int),
            "seed": tags["dino_lab.seed"].astype(int),
            "state": tags["dino_lab.state"],
            "verdict": tags["dino_lab.verdict"].replace("", None),
            "onset_step": pd.to_numeric(tags["dino_lab.onset_step"].replace("", None)).astype("Int64"),
            "left": tags.get("dino_lab.left", pd.Series("[]", index=tags.index)).fillna("[]").map(_left),
        },
        index=tags.index,
    )
    levels = pd.DataFrame(map(json.loads, tags["dino_lab.levels"]), index=tags.index).add_prefix("level:")
    params = _wide(params).apply(_literals).add_prefix("param:")
    metrics = _wide(metrics.assign(value=_numbers(metrics["value"], metrics["is_nan"])))
    metrics = metrics.reindex(columns=sorted({*metrics, *CURVES}))
    frames = [trials, _suggestions(tags, search), levels, params, metrics]
    return pd.concat(frames, axis="columns").sort_values(["row_index", "seed"]).reset_index(drop=True)


def _suggestions(tags: pd.DataFrame, search: Search | None) -> pd.DataFrame:
    """What Optuna suggested and was told; no columns of an ablation."""
    if search is None:
        return pd.DataFrame(index=tags.index)
    told = tags["dino_lab.told"].map(json.loads)
    values = {
        f"told:{objective}": [math.nan if each is None else float(each[i]) for each in told]
        for i, objective in enumerate(search.objectives)
    }
    return pd.DataFrame(
        {
            "search_state": tags["dino_lab.search_state"],
            "seeded": tags["dino_lab.seeded"].map(json.loads),
            "suggested": tags["dino_lab.suggested"],
            "changes": tags["dino_lab.changes"],
            **values,
        }
    )


def _left(text: str) -> str:
    return ", ".join(f"{kind} {first}–{last}" for kind, first, last in json.loads(text))


def _wide(cells: pd.DataFrame) -> pd.DataFrame:
    return cells.pivot(index="run_id", columns="key", values="value").rename_axis(columns=None)


def _literals(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Numbers and switches as such, if the knob has nothing else in any trial; otherwise the text as it was logged."""
    try:
        values = [json.loads(text) for text in column.dropna()]
    except json.JSONDecodeError:
        return column
    if any(isinstance(value, list | str) for value in values):
        return column
    return pd.Series(values, index=column.dropna().index).reindex(column.index)


def _curves(histories: pd.DataFrame, trial_ids: "pd.Series[str]") -> pd.DataFrame:
    """Of the runs whose trials these are."""
    values = histories.assign(trial_id=histories["run_id"].map(trial_ids)).rename(columns={"key": "metric"})
    values = values.astype({"trial_id": str, "step": int, "metric": str, "value": float})
    # Here and not in SQL, since databases differ in how they order names.
    values = values.sort_values(["trial_id", "metric", "step", "timestamp", "value"])
    # A step that came twice was replayed from the journal: the later timestamp is the one that stands.
    values = values.drop_duplicates(["trial_id", "step", "metric"], keep="last", ignore_index=True)
    values = values.assign(value=_numbers(values["value"], values["is_nan"]))
    return values[["trial_id", "step", "metric", "value"]]


def _numbers(value: "pd.Series[Any]", is_nan: "pd.Series[Any]") -> "pd.Series[float]":
    """Undoes MLflow's way of storing nan (0 and a flag) and infinity (the largest double)."""
    largest = sys.float_info.max
    return value.astype(float).replace({largest: math.inf, -largest: -math.inf}).mask(is_nan.astype(bool))
