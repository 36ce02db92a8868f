"""The picture of one trial: what it showed of itself over its steps, and where it collapsed."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tueplots import figsizes

from analysis.figures import OKABE_ITO, STYLE
from dino_lab.core import records as names
from dino_lab.core.records import Record

_BLUE, _ORANGE, _GREEN, _PINK, *_, _BLACK, _GREY = OKABE_ITO
_ENTROPIES = (
    (names.TEACHER_ENTROPY, "teacher entropy", _BLUE),
    (names.KL, "KL of teacher and student", _ORANGE),
    (names.MUTUAL_INFORMATION, "mutual information of image and prototype", _GREEN),
)
"""Drawn as fractions of ln K."""


def trial_curves(records: Sequence[Record], *, title: str, onset_step: int | None, unit: str = "step") -> Figure:
    """Teacher entropy, KL and mutual information as fractions of ln K, and k-NN, over the steps of one run.

    Where there are no entropies the loss takes their place, over ln K if the records have K, and the std of the outputs
    stands beside it. A line marks the onset of the collapse.

    Args:
        unit: What the steps of the records are.
    """
    prototypes = next(
        (each.values[names.PROTOTYPES_NUMBER] for each in records if _shows(each, names.PROTOTYPES_NUMBER)), None
    )
    scale = 1.0 if prototypes is None else math.log(prototypes)
    with style.context(STYLE):
        width, _ = figsizes.icml2024_half()["figure.figsize"]
        figure = Figure(figsize=(1.5 * width, 2.6))
        axes = figure.subplots()
        axes.set_title(title)
        axes.set_xlabel({"step": "optimiser step"}.get(unit, unit))
        has_entropies = prototypes is not None and any(_shows(each, names.TEACHER_ENTROPY) for each in records)
        if has_entropies:
            for name, label, color in _ENTROPIES:
                _draw(axes, records, name, label, color, scale=scale)
        else:
            _draw(axes, records, names.LOSS, "loss", _BLUE, scale=scale)
            _draw(axes, records, names.OUTPUT_STD, "std of outputs", _GREEN, scale=1.0)
        axes.set_ylabel("value" if prototypes is None else f"fraction of ln {prototypes:.0f}")
        low, high = axes.dataLim.intervaly
        # Room above ln K, where a line would lie on the edge.
        low, high = min(0.0, low), max(1.05 if prototypes else 0.0, 1.05 * high) or 1.0
        axes.set_ylim(low, high)
        if any(_shows(each, names.KNN) for each in records):
            knn = axes.twinx()
            _draw(knn, records, names.KNN, "k-NN of the class (right)", _PINK, scale=1.0, marker="o", clip_on=False)
            # As on the left where that is fractions, so that the lines of the grid serve both.
            knn.set_ylim((100 * low, 100 * high) if prototypes else (0, 105))
            knn.set_yticks(range(0, 101, 20))
            knn.yaxis.set_major_formatter(PercentFormatter(decimals=0))
            knn.grid(visible=False)
        axes.set_xlim(records[0].step, max(records[-1].step, records[0].step + 1))
        if onset_step is not None:
            axes.axvline(onset_step, color=_BLACK, linestyle=(0, (4, 2)), linewidth=0.8, label="onset")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _shows(record: Record, name: str) -> bool:
    return math.isfinite(record.values.get(name, math.nan))


def _draw(
    axes: Axes, records: Sequence[Record], name: str, label: str, color: str, *, scale: float, **line: Any
) -> None:
    """Nothing where no record has it; a gap where one is not finite."""
    shown = [(each.step, each.values[name] / scale) for each in records if name in each.values]
    if shown:
        steps, values = zip(*shown, strict=True)
        axes.plot(steps, values, color=color, label=label, **line)
