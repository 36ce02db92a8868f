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
_STYLE = [
    "default",
    {
        **fontsizes.icml2024(),
        "font.family": "STIXGeneral",
        "mathtext.fontset": "stix",
        "axes.linewidth": 0.5,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlepad": 4,
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


def curves(sweep: Sweep) -> Figure:
    """Teacher entropy and KL over training, as in the paper's Figure 7, and k-NN beside them.

    A line is the mean over a row's finished trials and the band their range, least to greatest. A trial that has not
    finished is a thin line of its own, with a cross where it diverged. A triangle is the median onset of collapse.
    """
    rows = summary.rows(sweep.trials)
    colors = dict(zip(rows, _palette(len(rows)), strict=True))
    legend_rows = math.ceil(len(rows) / _LEGEND_COLUMNS)
    with style.context(_STYLE):
        width, height = figsizes.icml2024_full(nrows=1, ncols=3, height_to_width_ratio=0.8)["figure.figsize"]
        figure = Figure(figsize=(width, height + 0.16 * legend_rows))
        entropy, kl, knn = figure.subplots(1, 3)
        for axes, metric, title in (
            (entropy, names.TEACHER_ENTROPY, "Teacher entropy (nats)"),
            (kl, names.KL, "KL(teacher ‖ student) (nats)"),
            (knn, names.KNN, "k-NN, held-out images (%)"),
        ):
            axes.set_title(title)
            axes.set_xlabel("optimiser step")
            _draw_rows(axes, sweep, metric, colors)
        _draw_uniform(entropy, sweep.trials)
        _draw_pixels(knn, sweep)
        for axes in (entropy, kl):
            axes.set_ylim(bottom=0)
            _draw_onsets(axes, sweep, colors)
        handles = [Line2D([], [], color=colors[row], label=row) for row in rows]
        figure.legend(handles=handles + _legend(sweep), loc="outside lower center", ncols=_LEGEND_COLUMNS)
    return figure
