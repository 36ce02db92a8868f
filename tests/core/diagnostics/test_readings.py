"""The verdict beside what readers saw in curves, on 175 trials of `shapes_cpu`.

`readings.csv` has each trial's settings and what two readers saw: its kind, what else an expert could call it, whether
no expert would differ, and the onset, with the earliest and the latest step. Curves had neither names nor settings nor
verdicts. Neither reader knew the bounds, but for the 48 first trials of reader b (9000 to 9047), who is the author. No
bound was chosen on these trials.
"""

import csv
import gzip
import math
from itertools import groupby
from pathlib import Path

import pytest

from dino_lab.core import records
from dino_lab.core.diagnostics.collapse import Collapse, Verdict

HERE = Path(__file__).parent / "readings"


def verdicts() -> dict[str, Verdict]:
    """By trajectory."""
    with gzip.open(HERE / "trajectories.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    made = {}
    for name, group in groupby(rows, key=lambda row: row["trajectory"]):
        shown = [
            (int(row["step"]), {k: float(v) for k, v in row.items() if k in records.METRICS and v}) for row in group
        ]
        bounds, verdict = Collapse().over(shown[-1][0]), Verdict()
        for step, values in shown:
            # A record without a loss is that of a loss that was not finite.
            verdict = verdict.after(step, {records.LOSS: math.nan} | values, bounds=bounds)
        made[name] = verdict
    return made


@pytest.fixture(scope="module")
def judged() -> list[tuple[dict[str, str], Verdict]]:
    found = verdicts()
    with (HERE / "readings.csv").open() as file:
        return [(row, found[row["trajectory"]]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("reader", ["a", "b"])
def test_a_kind_is_one_that_the_reader_gave(judged: list[tuple[dict[str, str], Verdict]], reader: str) -> None:
    read = [(row, verdict) for row, verdict in judged if row[f"{reader}_kind"]]
    right = [v.kind in (row[f"{reader}_kind"], *row[f"{reader}_also"].split("+")) for row, v in read]
    assert len(right) >= 150
    assert sum(right) / len(right) >= 0.95


@pytest.mark.parametrize("reader", ["a", "b"])
def test_no_trial_that_is_surely_healthy_is_called_collapsed(
    judged: list[tuple[dict[str, str], Verdict]], reader: str
) -> None:
    healthy = [v for row, v in judged if (row[f"{reader}_kind"], row[f"{reader}_sure"]) == ("none", "y")]
    assert len(healthy) >= 40
    assert not {verdict.kind for verdict in healthy} & set(records.COLLAPSES)
