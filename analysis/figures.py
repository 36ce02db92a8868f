"""Figures: frames -> matplotlib figures, and those -> bytes. The same records give the same bytes.

Made without pyplot, so that no display, no global state and no matplotlibrc has a say in them.
"""

import io
import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tueplots import figsizes, fontsizes

from analysis import summary, tables
from analysis.records import Sweep
from dino_lab.core import records as names

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Told apart with every kind of colour vision."""

_GREY = "#666666"
_LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Share of red, green and blue light in how light a colour is."""
_PROTOTYPES = ["param:method.prototypes_number", "param:method.head.out_dim"]
"""Knobs that are K, the first that a method has."""
STYLE: list[str | dict[str, Any]] = [
    "default",
    {
        **fontsizes.icml2024(),
        "axes.labelsize": 7,
        "font.family": "STIXGeneral",
        "mathtext.fontset": "stix",
        "axes.linewidth": 0.5,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlepad": 4,
        # Room for the label of a level above it.
        "axes.ymargin": 0.08,
        "grid.color": "#E6E6E6",
        "grid.linewidth": 0.4,
        "lines.linewidth": 1.2,
        "lines.markersize": 3,
        "xtick.major.width": 0.5,
        "xtick.major.size": 2,
        "ytick.major.width": 0.5,
        "ytick.major.size": 2,
        "legend.frameon": False,
        "legend.fontsize": 7,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,
        "svg.hashsalt": "dino_lab",
    },
]
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
    "png": {"Software": None},
}
FORMATS = tuple(_METADATA)


_LEGEND_LETTERS = 130
"""What a line of the legend holds, a key being as wide as nine letters."""
_ONSET: dict[str, Any] = {"marker": "v", "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
_UNFINISHED: dict[str, Any] = {"linewidth": 0.6, "markersize": 2}
_DIVERGED: dict[str, Any] = {"marker": "x", "markersize": 4, "markeredgewidth": 1}


def curves(sweep: Sweep) -> Figure:
    """Teacher entropy and KL over training, as in the paper's Figure 7, and k-NN beside them.

    A line is the mean over a row's finished trials and the band their range, least to greatest. A trial that has not
    finished is a thin line of its own, with a cross where it diverged. A triangle is the median onset of collapse.
    """
    rows = summary.rows(sweep.trials)
    colors = dict(zip(rows, palette(len(rows)), strict=True))
    with style.context(STYLE):
        handles = [Line2D([], [], color=color, label=row) for row, color in colors.items()] + _explained(sweep.trials)
        columns = max(1, min(5, _LEGEND_LETTERS // (9 + max(len(str(handle.get_label())) for handle in handles))))
        width, height = figsizes.icml2024_full(nrows=1, ncols=3, height_to_width_ratio=0.85)["figure.figsize"]
        figure = Figure(figsize=(width, height + 0.15 * math.ceil(len(handles) / columns)))
        entropy, kl, knn = figure.subplots(1, 3)
        for axes, metric, title in (
            (entropy, names.TEACHER_ENTROPY, "Teacher entropy (nats)"),
            (kl, names.KL, "KL of teacher and student (nats)"),
            (knn, names.KNN, "k-NN of held-out images (%)"),
        ):
            axes.set_title(title)
            axes.set_xlabel("optimiser step")
            values = sweep.curves[sweep.curves["metric"] == metric]
            for row, color in colors.items():
                trials = sweep.trials[sweep.trials["row"] == row]
                _draw_row(axes, trials, values, color, marker="o" if metric == names.KNN else "")
        _draw_uniform(entropy, sweep.trials)
        _draw_pixels(knn, sweep)
        for axes in (entropy, kl, knn):
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def factors(sweep: Sweep) -> Figure:
    """k-NN of each factor by row, means over finished trials; the references stand below the line.

    Beside it, if there are rows to compare, the difference from the baseline row, paired by seed.
    """
    table = tables.factors(sweep)
    knn, difference = (
        pd.DataFrame({factor: table[f"{factor}_{number}"] for factor in tables.factor_names(table)})
        for number in ("mean", "difference_mean")
    )
    rows = summary.rows(sweep.trials)
    height = 0.75 + 0.21 * len(table)
    with style.context(STYLE):
        if len(rows) == 1:
            width, _ = figsizes.icml2024_half()["figure.figsize"]
            figure = Figure(figsize=(width, height))
            left = figure.subplots()
            _draw_map(left, knn, "{:.0f}", cmap="cividis", vmin=0, vmax=100).set_label("k-NN (%)")
        else:
            width, _ = figsizes.icml2024_full()["figure.figsize"]
            figure = Figure(figsize=(width, height + 0.15))
            left, right = figure.subplots(1, 2)
            left.set_title("k-NN of each factor (%)")
            _draw_map(left, knn, "{:.0f}", cmap="cividis", vmin=0, vmax=100)
            right.set_title("Difference from the first row (points)")
            # Small differences stay pale, also where there is no large one.
            limit = math.ceil(np.fmax.reduce(difference.abs(), axis=None, initial=10))
            _draw_map(right, difference.loc[rows], "{:+.0f}", cmap="RdBu", vmin=-limit, vmax=limit)
            right.set_ylim(left.get_ylim())
            right.set_yticks([])
        left.axhline(len(rows) - 0.5, color="white", linewidth=2.5)
        left.set_yticks(range(len(table)), list(table.index))
    return figure


def render(figure: Figure, form: str) -> bytes:
    """The figure as a pdf, svg or png file, without the time or place of its making."""
    file = io.BytesIO()
    with style.context(STYLE):
        figure.savefig(file, format=form, metadata=_METADATA[form])
    return file.getvalue()


def palette(n: int) -> list[str]:
    """So many colours, told apart with every kind of colour vision while there are eight."""
    if n <= len(OKABE_ITO):
        return list(OKABE_ITO[:n])
    # The lightest end is left out: yellow is not seen on white.
    return [to_hex(color) for color in matplotlib.colormaps["viridis"](np.linspace(0, 0.9, n))]


def _draw_row(axes: Axes, trials: pd.DataFrame, values: pd.DataFrame, color: str, *, marker: str) -> None:
    finished = summary.final(trials)
    finished = finished[finished["trial_id"].isin(values["trial_id"])]
    over_seeds = values[values["trial_id"].isin(finished["trial_id"])].groupby("step")["value"]
    mean = over_seeds.mean()
    axes.fill_between(mean.index, over_seeds.min(), over_seeds.max(), color=color, alpha=0.2, linewidth=0)
    axes.plot(mean.index, mean, color=color, marker=marker)
    onset = summary.collapsed(finished)["onset_step"].median()
    # With markers at the few steps of an evaluation there is no line on which a step could be marked.
    if not marker and not pd.isna(onset):
        axes.plot(onset, np.interp(onset, mean.index, mean), color=color, zorder=4, **_ONSET)
    for trial in trials.drop(finished.index).itertuples():
        curve = values[values["trial_id"] == trial.trial_id]
        axes.plot(curve["step"], curve["value"], color=color, marker=marker, **_UNFINISHED)
        if not marker and trial.state == "diverged":
            axes.plot(curve["step"].iloc[-1:], curve["value"].iloc[-1:], color=color, zorder=4, **_DIVERGED)


def _explained(trials: pd.DataFrame) -> list[Line2D]:
    """Legend entries of the marks that this figure has."""
    states = set(trials["state"])
    marks = []
    if not summary.collapsed(trials).empty:
        marks.append(Line2D([], [], color=_GREY, linestyle="", label="onset of collapse", **_ONSET))
    if states & {"running", "interrupted", "failed"}:
        marks.append(Line2D([], [], color=_GREY, label="not finished", **_UNFINISHED))
    if "diverged" in states:
        marks.append(Line2D([], [], color=_GREY, linestyle="", label="diverged", **_DIVERGED))
    return marks


def _draw_uniform(axes: Axes, trials: pd.DataFrame) -> None:
    # Some methods have outputs and no prototypes, and so no entropy; a head may end before the prototypes.
    judged = trials.reindex(columns=[names.ENTROPY_FRACTION, *_PROTOTYPES]).dropna(subset=names.ENTROPY_FRACTION)
    for out_dim in sorted(judged[_PROTOTYPES].bfill(axis="columns").iloc[:, 0].dropna().unique()):
        _draw_level(axes, math.log(out_dim), f"ln {out_dim:.0f}")


def _draw_pixels(axes: Axes, sweep: Sweep) -> None:
    if not summary.judged_alike(sweep.trials):
        return  # each class has its own
    mean = summary.untrained(sweep.trials, sweep.curves, names.PIXELS_KNN, row=sweep.baseline_row)["mean"]
    if not math.isnan(mean):
        _draw_level(axes, mean, "raw pixels")


def _draw_map(axes: Axes, values: pd.DataFrame, form: str, **colors: Any) -> Colorbar:
    """Coloured cells with their numbers, and their bar of colours; – where a value is missing."""
    numbers = values.to_numpy(dtype=float)
    image = axes.imshow(numbers, aspect="auto", **colors)
    for (row, column), value in np.ndenumerate(numbers):
        text, color = "–", "black"
        if not np.isnan(value):
            # A sign before 0 would tell of nothing.
            text = form.format(value).replace("-", "−") if round(value) else "0"
            # Up to 0.18 white letters have more contrast than black ones.
            light = np.power(image.to_rgba(value)[:3], 2.2)
            color = "white" if np.dot(_LUMINANCE, light) < 0.18 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(numbers.shape[1]), list(map(str, values)), rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0, labelsize=7)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    low, high = image.get_clim()
    # As narrow beside many rows as beside few.
    aspect = max(20, 4 * len(numbers))
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=aspect, ticks=[low, (low + high) / 2, high])
    bar.outline.set_visible(False)
    return bar


def _draw_level(axes: Axes, height: float, label: str) -> None:
    axes.axhline(height, color=_GREY, linestyle=(0, (4, 2)), linewidth=0.8, zorder=1)
    axes.annotate(
        label,
        (1, height),
        (0, 1.5),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=6,
        color=_GREY,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.3},
    )
