"""The phase diagram: over two knobs, a third one by panels, what trials became; numbers apart from drawing."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from tueplots import figsizes

from analysis import summary
from analysis.figures import STYLE
from analysis.records import Sweep
from dino_lab.core import records as names

COLORS = {
    "none": "#FFFFFF",
    "not_started": "#BBBBBB",
    "uniform": "#56B4E9",
    "one_prototype": "#D55E00",
    "few_prototypes": "#E69F00",
    "constant": "#CC79A7",
    "dimensional": "#009E73",
    "diverged": "#000000",
}
"""By verdict: Okabe and Ito's, told apart with every kind of colour vision."""
_LEVEL = "level:"


def cells(sweep: Sweep) -> pd.DataFrame:
    """A row for each combination of levels: the levels as numbers, the verdict of most of its seeds that ended, of how
    many of them, their median onset, and their mean k-NN.

    A verdict is missing where no seed has ended. No rows if the sweep is no grid of two or three numeric axes.
    """
    axes = [str(column) for column in sweep.trials if str(column).startswith(_LEVEL)]
    levels = sweep.trials[axes].apply(pd.to_numeric, errors="coerce")
    if len(axes) not in (2, 3) or levels.isna().any(axis=None):
        return pd.DataFrame()
    places = levels.drop_duplicates()
    if len(places) != math.prod(levels.nunique()) or levels.nunique().min() < 2:
        return pd.DataFrame()
    table = []
    for place in places.itertuples(index=False):
        here = sweep.trials[(levels == list(place)).all(axis="columns")]
        ended = here["verdict"].where(here["state"] != "diverged", "diverged")[
            here.index.isin(summary.final(here).index) | (here["state"] == "diverged")
        ]
        # Of equals the worse, which is the later name.
        order = [*names.VERDICTS]
        counts = ended.value_counts()
        verdict = max(counts.index, key=lambda kind: (counts[kind], order.index(kind)), default=None)
        alike = here.loc[ended.index[ended == verdict]]
        table.append(
            dict(zip((axis.removeprefix(_LEVEL) for axis in axes), place, strict=True))
            | {
                "verdict": verdict,
                "alike": len(alike),
                "ended": len(ended),
                "onset": alike["onset_step"].median() if verdict in names.COLLAPSES else np.nan,
                "knn": alike[names.KNN].mean() if names.KNN in alike else np.nan,
            }
        )
    return pd.DataFrame(table)


def figure(sweep: Sweep) -> Figure | None:
    """Verdict as colour; in a cell the step of its onset, of a living trial k-NN. None if the sweep is no such grid.

    Several seeds show what most of them became, and how many of how many where they differ.
    """
    table = cells(sweep)
    if table.empty:
        return None
    *panels, down, across = [str(column) for column in table][: -len(("verdict", "alike", "ended", "onset", "knn"))]
    levels = table[panels[0]].unique().tolist() if panels else [None]
    with style.context(STYLE):
        width, _ = figsizes.icml2024_full()["figure.figsize"]
        rows = table[down].nunique()
        drawn = Figure(figsize=(width, 0.95 + 0.32 * rows))
        for axes, level in zip(np.atleast_1d(drawn.subplots(1, len(levels))), levels, strict=True):
            if level is None:
                _draw(axes, table, across, down)
            else:
                _draw(axes, table[table[panels[0]] == level], across, down)
                axes.set_title(f"{panels[0]} {level:g}")
        shown = [verdict for verdict in COLORS if verdict in set(table["verdict"])]
        handles = [Patch(facecolor=COLORS[each], edgecolor="#666666", linewidth=0.4, label=each) for each in shown]
        drawn.legend(handles=handles, loc="outside lower center", ncols=len(shown))
    return drawn


def _draw(axes: Axes, table: pd.DataFrame, across: str, down: str) -> None:
    xs, ys = sorted(table[across].unique()), sorted(table[down].unique())
    for cell in table.to_dict("records"):
        x, y = xs.index(cell[across]), ys.index(cell[down])
        color = COLORS.get(cell["verdict"], "#FFFFFF")
        edge: dict[str, Any] = {"edgecolor": "#999999", "linewidth": 0.4}
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, **edge))
        axes.text(x, y, _text(cell), ha="center", va="center", color="white" if color == "#000000" else "black")
    axes.set_xlim(-0.5, len(xs) - 0.5)
    axes.set_ylim(-0.5, len(ys) - 0.5)
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    axes.grid(visible=False)


def _text(cell: dict[Any, Any]) -> str:
    if pd.isna(cell["verdict"]):
        return "–"
    part = f"\n{cell['alike']}/{cell['ended']}" if cell["alike"] < cell["ended"] else ""
    if not pd.isna(cell["onset"]):
        return f"step {cell['onset']:.0f}{part}"
    return ("" if pd.isna(cell["knn"]) else f"{cell['knn']:.0f} %") + part
