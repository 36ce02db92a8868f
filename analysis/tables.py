"""Tables: numbers of a summary -> Markdown, LaTeX, CSV. Each takes frames and returns a frame or text.

CSV has every number in a column of its own; Markdown and LaTeX show the same rows as people read them.
"""

import re
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
"""Published metrics that are shown, and how; other ones (hours, memory) are not measured here."""

COLLAPSED, DIVERGED = "†", "‡"

LEFT = {"verdict"}
"""Columns of words; all others are set flush right."""


_INTERVAL = f"±: half-width of Student's t {summary.CONFIDENCE:.0%} interval over seeds; without it, a single seed."
_FEATURES = (
    "from the teacher's features, or the student's where there is no teacher or it was given; at the foot, from those"
    " of the untrained network of row {row} (step 0) and from raw pixels."
)
_MARKS = f"{COLLAPSED} a trial collapsed; {DIVERGED} a trial diverged."


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
    """Every number of the ablation's main table; below its rows, the untrained network and raw pixels."""
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
    table = pd.concat([pd.concat(parts, axis="columns"), references]).astype(dict.fromkeys(counts, "Int64"))
    numbers = published(sweep.published, sweep.paper_rows)
    for metric in PAPER:
        by_arm = numbers[numbers["metric"] == metric].groupby("row", sort=False)["value"]
        if set(by_arm.groups) & set(counts.index):
            # An arm that the paper gives at several settings keeps them all, in the paper's order.
            table[f"paper_{metric}"] = by_arm.agg(lambda values: " / ".join(f"{value:.1f}" for value in values))
    return table.rename_axis(index="arm")


def factors(sweep: Sweep) -> pd.DataFrame:
    """k-NN of every factor: n, mean and half-width by row; no columns if no factor was evaluated."""
    columns = [column for column in map(str, sweep.trials) if column.startswith(names.FACTOR_KNN)]
    parts = []
    for column in columns:
        factor = column.removeprefix(names.FACTOR_KNN)
        at_start = [
            summary.untrained(sweep.trials, sweep.curves, metric, row=sweep.baseline_row)
            for metric in (column, names.FACTOR_PIXELS_KNN + factor)
        ]
        references = pd.DataFrame(at_start, index=[UNTRAINED, PIXELS])
        parts.append(pd.concat([summary.means(sweep.trials, column), references]).add_prefix(f"{factor}_"))
    return pd.concat(parts, axis="columns").rename_axis(index="arm") if parts else pd.DataFrame()


def factor_names(table: pd.DataFrame) -> list[str]:
    """The factors that a table made by `factors` has columns of."""
    return [column.removesuffix("_mean") for column in map(str, table) if column.endswith("_mean")]


def arms_table(sweep: Sweep) -> Table:
    """The main table as people read it."""
    table = arms(sweep)
    counts = summary.counts(sweep.trials)
    rows = list(counts.index)
    blank = [""] * 2
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
        _MARKS + " Onset: median (range) over collapsed trials.",
        f"k-NN: class of held-out images, {_FEATURES.format(row=sweep.baseline_row)}",
    ]
    if len(rows) > 1:
        cells["Δ k-NN"] = _measured(table, "difference", digits=1, signed=True)
        notes.append(f"Δ: difference from {sweep.baseline_row}, paired by seed.")
    tests = table["difference_p"].count()
    if tests:
        cells["p"] = [_p(value) for value in table["difference_p_holm"]]
        notes[-1] += f" p: paired t-test with Holm's correction, number of tests: {tests}."
    numbers = published(sweep.published, sweep.paper_rows)
    for metric, column in PAPER.items():
        if f"paper_{metric}" in table:
            texts = table[f"paper_{metric}"].fillna("")
            cells[column] = [_papers(text, sweep.paper_rows.get(str(row))) for row, text in texts.items()]
            shown = numbers[numbers["row"].isin(rows) & (numbers["metric"] == metric)]
            places = " / ".join((shown["source"] + ", " + shown["setting"]).unique())
            own = " (in brackets the paper's own value)" if sweep.paper_rows else ""
            notes.append(f"{column.removesuffix(' %')}{own}: arXiv:2104.14294, {places}.")
    cells.index = pd.Index([*_marked(rows, counts), UNTRAINED, PIXELS])
    return Table(cells, _best(table, {"k-NN %": "knn"}), notes, references=2)


def factors_table(sweep: Sweep) -> Table:
    """k-NN of every factor as people read it."""
    table = factors(sweep)
    rows = summary.rows(sweep.trials)
    columns = {factor: factor for factor in factor_names(table)}
    cells = pd.DataFrame({factor: _measured(table, factor, digits=1) for factor in columns}, index=table.index)
    notes = [
        f"{sweep.title}. k-NN % of each factor of held-out images, {_FEATURES.format(row=sweep.baseline_row)}"
        f" {_INTERVAL}",
        _MARKS,
    ]
    cells.index = pd.Index([*_marked(rows, summary.counts(sweep.trials)), UNTRAINED, PIXELS])
    return Table(cells, _best(table, columns), notes, references=2)


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
    """A booktabs table; the best value of a column is bold, and a rule stands above the references."""
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
    lines.insert(lines.index(r"\bottomrule") - table.references, r"\midrule")
    return "\n".join([r"% \usepackage{booktabs}", *lines]) + "\n"


def _with_best(cells: pd.DataFrame, table: Table, bold: str) -> pd.DataFrame:
    for column, places in table.best.items():
        cells[column] = [bold.format(text) if place in places else text for place, text in enumerate(cells[column])]
    return cells


def _best(table: pd.DataFrame, columns: dict[str, str]) -> dict[str, list[int]]:
    """Shown column -> places of the highest mean; k-NN, the only thing that is ranked, is better higher."""
    means = {column: table[f"{part}_mean"].iloc[:-2].round(1) for column, part in columns.items()}
    return {
        column: [place for place, value in enumerate(mean) if value == mean.max()] for column, mean in means.items()
    }


def _marked(labels: list[str], counts: pd.DataFrame) -> list[str]:
    """Row labels with a mark for rows with a collapsed and rows with a diverged trial."""
    collapsed = counts[summary.COLLAPSES].sum(axis="columns") > 0
    diverged = counts["diverged"] > 0
    return [
        label + (f" {COLLAPSED}" if collapsed[label] else "") + (f" {DIVERGED}" if diverged[label] else "")
        for label in labels
    ]


def _measured(table: pd.DataFrame, part: str, *, digits: int, signed: bool = False) -> list[str]:
    """Mean ± half-width of the interval; the mean alone if there is no interval, nothing if there is no mean."""
    sign = "+" if signed else ""
    texts = []
    for mean, half in table[[f"{part}_mean", f"{part}_half"]].itertuples(index=False):
        text = "" if pd.isna(mean) else f"{mean:{sign}.{digits}f}".replace("-", "−")
        texts.append(text if pd.isna(half) else f"{text} ± {half:.{digits}f}")
    return texts


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


def _papers(number: str, arm: str | None) -> str:
    """The paper's number, and its own name of the row if that is another."""
    return f"{number} ({arm})" if number and arm else number


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
        COLLAPSED: r"$^\dagger$",
        DIVERGED: r"$^\ddagger$",
    }
)


def _latex_escape(text: str) -> str:
    return text.translate(_LATEX)
