"""Figures of a search: frames -> matplotlib figures; a trial has the same mark in all of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution
from tueplots import figsizes

from analysis import search
from analysis.figures import OKABE_ITO, STYLE
from analysis.phase import COLORS
from analysis.records import Sweep, plain
from dino_lab.core import records as names

_BLUE, _ORANGE, *_ = OKABE_ITO
_GREY = "#666666"
_COLUMNS = 4
"""Panels in a line."""
_LETTERS_AN_INCH = 20
"""Of a legend."""
_BANDWIDTH = 0.08
"""Of the mean of trials around a point, as a part of each range."""
_EDGES = (-0.03, 1.03)
"""Of an axis whose range is 0 to 1."""
_NEAR = 0.3
"""Weight of trials around a point under which nothing is said there."""


def _mark(outcome: str) -> dict[str, Any]:
    """Circles are healthy, triangles collapsed, in the colours of the phase diagram."""
    if outcome in names.COLLAPSES:
        return {"marker": "v", "markersize": 4.5, "markerfacecolor": COLORS[outcome], "markeredgewidth": 0.4}
    return {
        "none": {"marker": "o", "markerfacecolor": _BLUE, "markeredgecolor": "white", "markeredgewidth": 0.4},
        "not_started": {"marker": "o", "markerfacecolor": COLORS["not_started"], "markeredgewidth": 0.4},
        "diverged": {"marker": "x", "markeredgewidth": 1},
        "pruned": {"marker": "o", "markersize": 2.5, "markerfacecolor": "none", "markeredgewidth": 0.5},
        "failed": {"marker": "+", "markersize": 4, "markeredgewidth": 0.8},
    }[outcome]


@dataclass(frozen=True)
class _Scale:
    """Where values of a knob lie between 0 and 1, and what stands beside the axis."""

    place: Callable[[Any], float]
    ticks: list[Any]

    @classmethod
    def of(cls, distribution: BaseDistribution) -> "_Scale":
        if isinstance(distribution, CategoricalDistribution):
            choices = list(distribution.choices)
            return cls(lambda value: (choices.index(value) + 0.5) / len(choices), choices)
        low, high = distribution.low, distribution.high  # type: ignore[attr-defined]
        if distribution.log:  # type: ignore[attr-defined]
            span = math.log(high / low)
            subs = (1.0,) if high / low > 100 else (1.0, 3.0) if high / low > 20 else (1.0, 2.0, 5.0)
            ticks = LogLocator(subs=subs).tick_values(low, high)
            return cls(lambda value: math.log(value / low) / span, [tick for tick in ticks if low <= tick <= high])
        ticks = MaxNLocator(4, integer=isinstance(low, int)).tick_values(low, high)
        return cls(lambda value: (value - low) / (high - low), [tick for tick in ticks if low <= tick <= high])

    def label(self, tick: Any) -> str:
        return f"{tick:g}" if isinstance(tick, float) else plain(tick)


def history(sweep: Sweep) -> Figure:
    """Each objective by the number of the trial, and the best so far where there is a best."""
    points, objectives = search.points(sweep), search.asked(sweep).objectives
    numbers = sweep.trials["row_index"]
    with style.context(STYLE):
        width, _ = figsizes.icml2024_full()["figure.figsize"]
        figure = Figure(figsize=(width, 0.6 + 1.7 * len(objectives)))
        for axes, objective in zip(figure.subplots(len(objectives), 1, squeeze=False)[:, 0], objectives, strict=True):
            axes.set_title(search.label(objective))
            if len(objectives) == 1:
                complete = points[objective].where(sweep.trials["search_state"] == "COMPLETE")
                best = search.cost(search.cost(complete, objective).cummin(), objective).ffill()
                axes.step(numbers, best, where="post", color=_ORANGE, zorder=1)
            _scatter(axes, numbers, points, objective)
            axes.set_xlim(-1, numbers.max() + 1)
        axes.set_xlabel("number of the trial")
        line = [Line2D([], [], color=_ORANGE, label="best so far")] if len(objectives) == 1 else []
        _legend(figure, points, line)
    return figure


def slices(sweep: Sweep, shares: pd.DataFrame) -> Figure:
    """The first objective over each knob, the most important first."""
    points, objective = search.points(sweep), search.asked(sweep).objectives[0]
    known, short = search.distributions(sweep), search.short_names(sweep)
    order = search.by_importance(shares)
    rows = math.ceil(len(order) / _COLUMNS)
    with style.context(STYLE):
        width, _ = figsizes.icml2024_full()["figure.figsize"]
        figure = Figure(figsize=(width, 0.35 + 1.45 * rows))
        grid = figure.subplots(rows, _COLUMNS, sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, order, strict=False):
            there = points[points[name].notna()]
            scale = _Scale.of(known[name])
            _scatter(axes, there[name].map(scale.place), there, objective)
            _label(axes, "x", scale, short[name])
        for axes in grid.flat[len(order) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel(search.label(objective))
        _legend(figure, points, [])
    return figure


def contour(sweep: Sweep, shares: pd.DataFrame) -> Figure:
    """The first objective over the two most important knobs: trials, and the mean of those around a place.

    The mean of complete trials has Gaussian weights of a width of `_BANDWIDTH` of each range; nothing is said where no
    trial is near.
    """
    points, objective = search.points(sweep), search.asked(sweep).objectives[0]
    known, short = search.distributions(sweep), search.short_names(sweep)
    across, down, *_ = search.by_importance(shares)
    there = points[points[across].notna() & points[down].notna()]
    x_scale, y_scale = _Scale.of(known[across]), _Scale.of(known[down])
    xs, ys = there[across].map(x_scale.place).astype(float), there[down].map(y_scale.place).astype(float)
    complete = sweep.trials.loc[there.index, "search_state"] == "COMPLETE"
    with style.context(STYLE):
        width, _ = figsizes.icml2024_half()["figure.figsize"]
        figure = Figure(figsize=(1.5 * width, 3.2))
        axes = figure.subplots()
        axes.grid(visible=False)
        if complete.any():
            surface = _smooth(xs[complete], ys[complete], there.loc[complete, objective])
            side = np.linspace(*_EDGES, len(surface))
            drawn = axes.contourf(side, side, surface, levels=10, cmap="cividis")
            bar = figure.colorbar(drawn, ax=axes, pad=0.02, aspect=30)
            bar.set_label(search.label(objective))
            bar.outline.set_visible(False)
        for outcome, part in there.groupby("outcome", sort=False):
            if outcome not in ("running", "failed"):
                axes.plot(xs[part.index], ys[part.index], color="black", linestyle="", **_mark(str(outcome)))
        _label(axes, "x", x_scale, short[across])
        _label(axes, "y", y_scale, short[down])
        _legend(figure, there[there["outcome"] != "failed"], [])
    return figure


def importance(sweep: Sweep, shares: pd.DataFrame) -> Figure:
    """fANOVA and PED-ANOVA of each knob side by side, objectives one above the other."""
    short, objectives = search.short_names(sweep), search.asked(sweep).objectives
    order = search.by_importance(shares)[::-1]
    with style.context(STYLE):
        width, _ = figsizes.icml2024_full()["figure.figsize"]
        figure = Figure(figsize=(width, len(objectives) * (0.55 + 0.19 * len(order))))
        grid = figure.subplots(len(objectives), 2, sharey=True, sharex=True, squeeze=False)
        for (left, right), objective in zip(grid, objectives, strict=True):
            part = shares.loc[objective].loc[order]
            of = f", {search.label(objective)}" if len(objectives) > 1 else ""
            left.set_title(f"fANOVA{of}")
            left.barh(range(len(order)), part["fanova"], color=_BLUE, height=0.6)
            left.hlines(range(len(order)), part["least"], part["greatest"], color="black", linewidth=0.8)
            for place, share in enumerate(part["fanova"]):
                if np.isnan(share):
                    left.text(0, place, " –", va="center")
            right.set_title(f"PED-ANOVA{of}")
            right.barh(range(len(order)), part["ped_anova"], color=_ORANGE, height=0.6)
            left.set_yticks(range(len(order)), [short[name] for name in order])
            for axes in (left, right):
                axes.grid(visible=False, axis="y")
                axes.tick_params(axis="y", length=0)
        for axes in grid[-1]:
            axes.set_xlabel("share of importance")
            axes.set_xlim(left=0)
    return figure


def pareto(sweep: Sweep) -> Figure:
    """The first objective over each of the others; the line joins trials that no other is better than in everything."""
    points, (first, *others) = search.points(sweep), search.asked(sweep).objectives
    points = points[points[first].notna()]
    ranked = search.ranked(sweep)
    front = points.loc[ranked.index[ranked["best"]]]
    with style.context(STYLE):
        width, _ = figsizes.icml2024_half()["figure.figsize"]
        figure = Figure(figsize=(1.2 * width * len(others), 2.8))
        for axes, other in zip(figure.subplots(1, len(others), squeeze=False)[0], others, strict=True):
            along = front.sort_values([other, first])
            axes.plot(along[other], along[first], color=_ORANGE, zorder=1, marker="o", markersize=7, alpha=0.5)
            _scatter(axes, points[other], points, first)
            axes.set_xlabel(search.label(other))
            axes.set_ylabel(search.label(first))
        line = Line2D([], [], color=_ORANGE, marker="o", markersize=7, alpha=0.5, label="no other is better in all")
        _legend(figure, points, [line])
    return figure


def _scatter(axes: Axes, xs: "pd.Series[Any]", points: pd.DataFrame, objective: str) -> None:
    """Trials with a value by what became of them; those that failed at the foot."""
    for outcome, part in points.groupby("outcome", sort=False):
        if outcome == "failed":
            foot = axes.get_xaxis_transform()
            axes.plot(xs[part.index], [0.02] * len(part), color=_GREY, linestyle="", transform=foot, **_mark("failed"))
        elif outcome != "running":
            axes.plot(xs[part.index], part[objective], color="black", linestyle="", **_mark(str(outcome)))


def _smooth(xs: Any, ys: Any, values: Any) -> np.ndarray:
    """The weighted mean of values around each place of a square."""
    side = np.linspace(*_EDGES, 150)
    across, down = np.meshgrid(side, side)
    squares = (across[..., None] - np.asarray(xs)) ** 2 + (down[..., None] - np.asarray(ys)) ** 2
    weights = np.exp(-squares / (2 * _BANDWIDTH**2))
    total = weights.sum(axis=-1)
    return np.where(total > _NEAR, weights @ np.asarray(values, dtype=float) / total, np.nan)


def _label(axes: Axes, which: str, scale: _Scale, name: str) -> None:
    places, texts = [scale.place(tick) for tick in scale.ticks], [scale.label(tick) for tick in scale.ticks]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(places, texts)
    axis.set_label_text(name)
    (axes.set_xlim if which == "x" else axes.set_ylim)(*_EDGES)


def _legend(figure: Figure, points: pd.DataFrame, more: list[Line2D]) -> None:
    """What the marks mean that are there, in as many columns as there is room for."""
    there = set(points["outcome"])
    handles = [
        Line2D([], [], color="black", linestyle="", label="no collapse" if each == "none" else each, **_mark(each))
        for each in (*COLORS, "pruned", "failed")
        if each in there
    ] + more
    if handles:
        letters = 5 + max(len(str(handle.get_label())) for handle in handles)
        columns = int(figure.get_figwidth() * _LETTERS_AN_INCH / letters)
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns))
