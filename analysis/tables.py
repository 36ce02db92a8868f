"""Tables: numbers of a summary -> Markdown, LaTeX, CSV. Each takes frames and returns a frame or text.

CSV has every number in a column of its own; Markdown and LaTeX show the same rows as people read them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tabulate import tabulate

from analysis import summary
from analysis.published import published
from analysis.records import Sweep
from dino_lab.core import records as names

UNTRAINED = "untrained network"
PIXELS = "raw pixels"
PAPER = {"knn_top1": "paper k-NN %", "linear_top1": "paper linear %"}
"""Published metrics that the main table shows, and how."""
PAPER_COST = {"wall_hours": "paper hours", "memory_gib_per_gpu": "paper GiB a GPU"}
"""Those of the table of cost."""

COLLAPSED, DIVERGED, STOPPED, LEFT_ONE = "†", "‡", "§", "¶"

_DIFFERENCE = "_difference"
"""Ends a factor's name where a column is of its difference from the baseline row."""

LEFT = {"state", "verdict"}
"""Columns of words; all others are set flush right."""


_INTERVAL = f"±: half-width of Student's t {summary.CONFIDENCE:.0%} interval over seeds; without it, a single seed."
_FEATURES = (
    "from the teacher's features, or the student's where there is no teacher or it was given; at the foot, from those"
    " of the untrained network of row {row} (step 0) and from raw pixels."
)
_MARKS = f"{COLLAPSED} a trial collapsed; {DIVERGED} a trial diverged."
_STOPPED = f"{STOPPED} a trial was stopped for its collapse, and has fewer steps than the others."
_LEFT_ONE = f"{LEFT_ONE} a trial had collapsed before, and left it: {{}}."


@dataclass(frozen=True)
class Table:
    """A table as people read it, and what its marks and columns mean."""

    cells: pd.DataFrame
    """Strings; the index holds the row labels."""
    best: dict[str, list[int]]
    """Column -> places of the rows with its best value, as far as it is shown."""
    notes: list[str]
    references: int
    """How many of the last rows are references: what the ablation's rows are measured against."""


def arms(sweep: Sweep) -> pd.DataFrame:
    """Every number of the ablation's main table; below its rows, the untrained network and raw pixels.

    Without k-NN of the untrained network and of pixels, as on data without labels, nothing stands below.
    """
    trials, curves = sweep.trials, sweep.curves
    counts = summary.counts(trials)
    parts = [
        counts,
        summary.onsets(trials).add_prefix("onset_"),
        summary.means(trials, names.ENTROPY_FRACTION).add_prefix("entropy_fraction_"),
        summary.means(trials, names.KL).add_prefix("kl_"),
        summary.means(trials, names.KNN).add_prefix("knn_"),
        summary.differences(trials, names.KNN, baseline_row=sweep.baseline_row).add_prefix("difference_"),
    ]
    references = pd.DataFrame(
        [
            summary.untrained(trials, curves, names.KNN, row=sweep.baseline_row).add_prefix("knn_"),
            summary.untrained(trials, curves, names.PIXELS_KNN, row=sweep.baseline_row).add_prefix("knn_"),
        ],
        index=[UNTRAINED, PIXELS],
    )
    references = references[references["knn_n"] > 0]
    table = pd.concat([pd.concat(parts, axis="columns"), references]).astype(dict.fromkeys(counts, "Int64"))
    return table.join(_paper_numbers(sweep, PAPER)).rename_axis(index="arm")


def factors(sweep: Sweep) -> pd.DataFrame:
    """k-NN of every factor by row, and its difference from the baseline row: n, mean and half-width of each.

    References are of the baseline row, or of the first row that is judged by images with the factor. No columns if no
    factor was evaluated.
    """
    columns = [column for column in map(str, sweep.trials) if column.startswith(names.FACTOR_KNN)]
    parts = []
    for column in columns:
        factor = column.removeprefix(names.FACTOR_KNN)
        means = summary.means(sweep.trials, column)
        rows = [sweep.baseline_row, *means.index]
        having = next((row for row in rows if means.at[row, "n"]), sweep.baseline_row)
        at_start = [
            summary.untrained(sweep.trials, sweep.curves, metric, row=having)
            for metric in (column, names.FACTOR_PIXELS_KNN + factor)
        ]
        references = pd.DataFrame(at_start, index=[UNTRAINED, PIXELS])
        differences = summary.differences(sweep.trials, column, baseline_row=sweep.baseline_row)
        parts += [
            pd.concat([means, references]).add_prefix(f"{factor}_"),
            differences[["n", "mean", "half"]].add_prefix(f"{factor}{_DIFFERENCE}_"),
        ]
    return pd.concat(parts, axis="columns").rename_axis(index="arm") if parts else pd.DataFrame()


EVALUATIONS = {
    "knn": (names.KNN, "k-NN %"),
    "student_knn": (names.STUDENT_KNN, "student k-NN %"),
    "linear": (names.LINEAR, "linear %"),
    "student_linear": (names.STUDENT + "linear_top1", "student linear %"),
    "low_shot_1": (names.LOW_SHOT + "1", "1 % of labels"),
    "low_shot_10": (names.LOW_SHOT + "10", "10 % of labels"),
    "retrieval": (names.RETRIEVAL, "mAP %"),
    "jaccard_60": (names.JACCARD + "60", "Jaccard 60 %"),
    "jaccard_80": (names.JACCARD + "80", "Jaccard 80 %"),
    "rank": (names.EVALUATED_RANK, "rank"),
}
"""What is evaluated at the end, by its name in files: the metric, and how it is called."""
_BEST = "best_knn"


def evaluations(sweep: Sweep) -> pd.DataFrame:
    """Every evaluation of the last step by row: n, mean and half-width; and the best k-NN over training, apart.

    At the foot the untrained network of the baseline row. No column of what no trial has.
    """
    parts = {}
    for name, (metric, _) in EVALUATIONS.items():
        means = summary.means(sweep.trials, metric)
        if means["n"].any():
            untrained = summary.untrained(sweep.trials, sweep.curves, metric, row=sweep.baseline_row)
            parts[name] = pd.concat([means, pd.DataFrame([untrained], index=[UNTRAINED])])
    if "knn" in parts:
        parts[_BEST] = summary.best(sweep.trials, sweep.curves, names.KNN).reindex(parts["knn"].index)
    columns = [part.add_prefix(f"{name}_") for name, part in parts.items()]
    return pd.concat(columns, axis="columns").rename_axis(index="arm") if columns else pd.DataFrame()


def factor_names(table: pd.DataFrame) -> list[str]:
    """The factors that a table made by `factors` has columns of."""
    suffix = f"{_DIFFERENCE}_mean"
    return [column.removesuffix(suffix) for column in map(str, table) if column.endswith(suffix)]


def cost(sweep: Sweep) -> pd.DataFrame:
    """What the trials of each row cost, as in the paper's Table 8; no columns if no trial recorded it."""
    trials = sweep.trials
    if names.TRAIN_MINUTES not in trials:
        return pd.DataFrame()
    parts = [
        summary.counts(trials)[["planned", "finished"]],
        summary.means(trials, names.TRAIN_MINUTES).add_prefix("train_minutes_"),
        summary.means(trials, names.PEAK_MEMORY).add_prefix("peak_memory_mib_"),
        summary.means(trials, names.IMAGES_PER_SECOND).add_prefix("images_per_second_"),
    ]
    return pd.concat(parts, axis="columns").join(_paper_numbers(sweep, PAPER_COST)).rename_axis(index="arm")


def arms_table(sweep: Sweep) -> Table:
    """The main table as people read it."""
    table = arms(sweep)
    counts = summary.counts(sweep.trials)
    rows = list(counts.index)
    references = list(table.index[len(rows) :])
    blank = [""] * len(references)
    cells = pd.DataFrame(index=table.index)
    cells["n"] = [f"{row.finished}/{row.planned}" for row in counts.itertuples()] + blank
    cells["entropy / ln K"] = _measured(table, "entropy_fraction", digits=3)
    cells["KL, nats"] = _measured(table, "kl", digits=3)
    cells["verdict"] = [_verdict(counts.loc[row]) for row in rows] + blank
    cells["onset, step"] = [_onset(table.loc[row]) for row in table.index]
    cells["k-NN %"] = _measured(table, "knn", digits=1)
    notes = [
        f"{sweep.title}. n: trials finished of those planned; values are those of their last step, collapsed trials"
        f" included. {_INTERVAL}",
        _marks(sweep) + " Onset: median (range) over collapsed trials.",
        f"k-NN: class of held-out images, {_FEATURES.format(row=sweep.baseline_row)}"
        if table["knn_n"].any()
        else "k-NN: no trial has it, as on data without labels.",
    ]
    if not summary.judged_alike(sweep.trials):
        notes[-1] += " Rows are judged by different images: k-NN of one and of another are not to be compared."
    if table["difference_n"].any():
        cells["Δ k-NN"] = _measured(table, "difference", digits=1, signed=True)
        notes.append(f"Δ: difference from {sweep.baseline_row}, paired by seed.")
    tests = table["difference_p"].count()
    if tests:
        cells["p"] = [_p(value) for value in table["difference_p_holm"]]
        notes[-1] += f" p: paired t-test with Holm's correction, number of tests: {tests}."
    cells = cells.join(_paper_cells(table, sweep, PAPER))
    notes += _paper_notes(sweep, PAPER)
    cells.index = pd.Index([*_marked(rows, counts), *references])
    # Of rows that are judged by different images none is the best.
    best = _best(table.loc[rows], {"k-NN %": "knn"} if summary.judged_alike(sweep.trials) else {})
    return Table(cells, best, notes, references=len(references))


def factors_table(sweep: Sweep) -> Table:
    """k-NN of every factor as people read it."""
    table = factors(sweep)
    rows = summary.rows(sweep.trials)
    columns = {factor: factor for factor in factor_names(table)}
    cells = pd.DataFrame({factor: _measured(table, factor, digits=1) for factor in columns}, index=table.index)
    notes = [
        f"{sweep.title}. k-NN % of each factor of held-out images, {_FEATURES.format(row=sweep.baseline_row)}"
        f" {_INTERVAL}",
        _marks(sweep),
    ]
    if not summary.judged_alike(sweep.trials):
        notes[0] += " Where that row is not judged by images with a factor, the foot is of the first row that is."
    cells.index = pd.Index([*_marked(rows, summary.counts(sweep.trials)), UNTRAINED, PIXELS])
    return Table(cells, _best(table.loc[rows], columns), notes, references=2)


def evaluations_table(sweep: Sweep) -> Table:
    """The evaluations as people read them."""
    table = evaluations(sweep)
    rows = summary.rows(sweep.trials)
    shown = {name: label for name, (_, label) in EVALUATIONS.items() if f"{name}_mean" in table}
    cells = pd.DataFrame({label: _measured(table, name, digits=1) for name, label in shown.items()}, index=table.index)
    notes = [
        f"{sweep.title}. Of the last step, on held-out images; the foot is the untrained network of row"
        f" {sweep.baseline_row}. {_INTERVAL}",
        "Linear and low-shot: the class by a classifier on frozen features, its knobs chosen on training images. mAP:"
        " the class by retrieval. Jaccard: objects and the attention of the best head, by the part of it that counts."
        " Rank: effective rank of the features.",
        _marks(sweep),
    ]
    if f"{_BEST}_mean" in table:
        cells["best k-NN %"] = _measured(table, _BEST, digits=1)
        notes[1] += " Best k-NN: the highest over training, chosen on the test images, and so too high; no result."
    if not summary.judged_alike(sweep.trials):
        notes[0] += " Rows are judged by different images: their numbers are not to be compared."
    cells.index = pd.Index([*_marked(rows, summary.counts(sweep.trials)), UNTRAINED])
    ranked = [name for name in shown if name not in ("rank", "student_knn", "student_linear")]
    best = _best(table.loc[rows], {shown[name]: name for name in ranked} if summary.judged_alike(sweep.trials) else {})
    return Table(cells, best, notes, references=1)


def cost_table(sweep: Sweep) -> Table:
    """What the trials of each row cost, as people read it."""
    table = cost(sweep)
    cells = pd.DataFrame(index=table.index)
    cells["n"] = [f"{row.finished}/{row.planned}" for row in table.itertuples()]
    for column, part in {
        "training, min": "train_minutes",
        "peak memory, MiB": "peak_memory_mib",
        "images/s": "images_per_second",
    }.items():
        cells[column] = _measured(table, part, digits=digits(table[f"{part}_mean"]))
    cells = cells.join(_paper_cells(table, sweep, PAPER_COST))
    notes = [
        f"{sweep.title}. n: trials finished of those planned. Training: time in the training steps of a trial, over all"
        " its attempts. Peak memory: of a trial's process; on CUDA, of the device. images/s: training images a second"
        f" up to the last record. {_INTERVAL} All of it depends on the machine and on what ran beside a trial.",
        _marks(sweep),
        *_paper_notes(sweep, PAPER_COST),
    ]
    cells.index = pd.Index(_marked(list(table.index), summary.counts(sweep.trials)))
    return Table(cells, {}, notes, references=0)


def csv(table: pd.DataFrame) -> str:
    """Six significant digits; what is missing is empty."""
    return table.to_csv(float_format="%.6g", lineterminator="\n")


def markdown(table: Table) -> str:
    """The best value of a column is bold; notes follow the table."""
    cells = _with_best(table.cells.map(_markdown_escape).rename(index=_markdown_escape), table, "**{}**")
    align = ["left", *("left" if column in LEFT else "right" for column in cells)]
    text = tabulate(cells, headers="keys", tablefmt="pipe", disable_numparse=True, colalign=align)
    return "\n\n".join([text, *map(_markdown_escape, table.notes)]) + "\n"


def latex(table: Table, *, label: str) -> str:
    """A booktabs table; the best value of a column is bold, and a rule stands above the references if there are any."""
    cells = _with_best(table.cells.map(_latex_escape).rename(index=_latex_escape), table, r"\textbf{{{}}}")
    align = "l" + "".join("l" if column in LEFT else "r" for column in cells)
    text = cells.rename(columns=_latex_escape).style.to_latex(
        hrules=True,
        column_format=align,
        position="t",
        position_float="centering",
        label=f"tab:{label}",
        caption=_latex_escape(" ".join(table.notes)),
    )
    lines = text.splitlines()
    if table.references:
        lines.insert(lines.index(r"\bottomrule") - table.references, r"\midrule")
    return "\n".join([r"% \usepackage{booktabs}", *lines]) + "\n"


def _with_best(cells: pd.DataFrame, table: Table, bold: str) -> pd.DataFrame:
    for column, places in table.best.items():
        cells[column] = [bold.format(text) if place in places else text for place, text in enumerate(cells[column])]
    return cells


def _best(table: pd.DataFrame, columns: dict[str, str]) -> dict[str, list[int]]:
    """Shown column -> places of the highest mean; k-NN, the only thing that is ranked, is better higher."""
    means = {column: table[f"{part}_mean"].round(1) for column, part in columns.items()}
    return {
        column: [place for place, value in enumerate(mean) if value == mean.max()] for column, mean in means.items()
    }


def _marked(labels: list[str], counts: pd.DataFrame) -> list[str]:
    """Row labels with a mark for each of what happened to one of their trials."""
    marks = {
        COLLAPSED: counts[list(names.COLLAPSES)].sum(axis="columns") > 0,
        DIVERGED: counts["diverged"] > 0,
        STOPPED: counts["stopped"] > 0,
        LEFT_ONE: counts["left"] > 0,
    }
    return [label + "".join(f" {mark}" for mark, has in marks.items() if has[label]) for label in labels]


def _marks(sweep: Sweep) -> str:
    """What the marks mean, of the rarer ones only those that are there."""
    counts, trials = summary.counts(sweep.trials), summary.final(sweep.trials)
    left = [f"{each['row']}, seed {each['seed']}: {each['left']}" for each in trials.to_dict("records") if each["left"]]
    stopped = [_STOPPED] if counts["stopped"].any() else []
    return " ".join([_MARKS, *stopped, *([_LEFT_ONE.format("; ".join(left))] if left else [])])


def _measured(table: pd.DataFrame, part: str, *, digits: int, signed: bool = False) -> list[str]:
    """Mean ± half-width of the interval; the mean alone if there is no interval, nothing if there is no mean."""
    sign = "+" if signed else ""
    texts = []
    for mean, half in table[[f"{part}_mean", f"{part}_half"]].itertuples(index=False):
        text = "" if pd.isna(mean) else f"{mean:{sign}.{digits}f}".replace("-", "−")
        texts.append(text if pd.isna(half) else f"{text} ± {half:.{digits}f}")
    return texts


def digits(means: "pd.Series[Any]") -> int:
    """Decimals with which the largest mean has three digits, two decimals at most: trials last seconds or days."""
    largest = means.max()
    return max(0, 2 - int(math.log10(largest))) if largest >= 1 else 2


def _verdict(counts: "pd.Series[Any]") -> str:
    """How each planned seed ended; the bare word if all ended alike."""
    there = [(outcome, counts[outcome]) for outcome in summary.COUNTS if counts[outcome]]
    return there[0][0] if len(there) == 1 else ", ".join(f"{n} {outcome}" for outcome, n in there)


def _onset(onset: "pd.Series[Any]") -> str:
    """Median and range."""
    if pd.isna(onset["onset_median"]):
        return ""
    low, high = onset["onset_min"], onset["onset_max"]
    return f"{onset['onset_median']:.0f}" + (f" ({low:.0f}–{high:.0f})" if low < high else "")


def _p(value: float) -> str:
    if pd.isna(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _published(sweep: Sweep) -> pd.DataFrame:
    """The published numbers of the sweep's rows."""
    numbers = published(sweep.published, sweep.paper_rows)
    return numbers[numbers["row"].isin(sweep.trials["row"])]


def _paper_numbers(sweep: Sweep, metrics: Mapping[str, str]) -> pd.DataFrame:
    """By row: the paper's numbers, as text; no column of a metric that it has for none of the rows."""
    numbers = _published(sweep)
    columns = {}
    for metric in metrics:
        by_row = numbers[numbers["metric"] == metric].groupby("row", sort=False)["value"]
        if by_row.ngroups:
            # An arm that the paper gives at several settings keeps them all, in the paper's order.
            columns[f"paper_{metric}"] = by_row.agg(lambda values: " / ".join(f"{value:.1f}" for value in values))
    return pd.DataFrame(columns)


def _paper_cells(table: pd.DataFrame, sweep: Sweep, metrics: Mapping[str, str]) -> pd.DataFrame:
    """The paper's numbers of a table as people read them, with its own name of a row that has another here."""
    cells = pd.DataFrame(index=table.index)
    for metric, column in metrics.items():
        if f"paper_{metric}" in table:
            texts = table[f"paper_{metric}"].fillna("")
            arms = [sweep.paper_rows.get(str(row)) for row in table.index]
            cells[column] = [f"{text} ({arm})" if text and arm else text for text, arm in zip(texts, arms, strict=True)]
    return cells


def _paper_notes(sweep: Sweep, metrics: Mapping[str, str]) -> list[str]:
    """Where in the paper the columns come from; one note for those from the same places."""
    numbers = _published(sweep)
    columns: dict[str, list[str]] = {}
    for metric, column in metrics.items():
        shown = numbers[numbers["metric"] == metric]
        if not shown.empty:
            places = " / ".join((shown["source"] + ", " + shown["setting"]).unique())
            columns.setdefault(places, []).append(column.removesuffix(" %"))
    own = " (in brackets the paper's own value)" if sweep.paper_rows else ""
    return [f"{', '.join(shown)}{own}: arXiv:2104.14294, {places}." for places, shown in columns.items()]


def _markdown_escape(text: str) -> str:
    return re.sub(r"[\\|*`]|<(?=[A-Za-z/!])", r"\\\g<0>", text)


_LATEX = str.maketrans(
    {char: f"\\{char}" for char in "%_#&${}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "−": "$-$",
        "±": r"$\pm$",
        "–": "--",
        "Δ": r"$\Delta$",
        STOPPED: r"\S{}",
        LEFT_ONE: r"\P{}",
        COLLAPSED: r"$^\dagger$",
        DIVERGED: r"$^\ddagger$",
    }
)


def _latex_escape(text: str) -> str:
    return text.translate(_LATEX)
