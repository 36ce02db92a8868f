"""Logs that others wrote, as records; and what a loss alone tells of a collapse. No torch.

Read are JSON lines as official DINO, DINOv2 and DINOv3 write them, and any JSON lines or CSV with the names of COLUMNS.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

from dino_lab.core import records
from dino_lab.core.diagnostics.collapse import Crossed, Sign, Verdict
from dino_lab.core.records import Record

Unit: TypeAlias = Literal["step", "iteration", "epoch"]
Form: TypeAlias = Literal["DINO", "DINOv2", "DINOv3", "named columns"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "step": ("step", "global_step"),
    "iteration": ("iteration", "iter"),
    "epoch": ("epoch",),
    records.LOSS: ("train/loss", "loss", "train_loss", "dino_loss"),
    records.TEACHER_ENTROPY: ("train/teacher_entropy", "teacher_entropy"),
    records.KL: ("train/kl", "kl"),
    records.MUTUAL_INFORMATION: ("targets/mutual_information", "mutual_information"),
    records.PROTOTYPES_NUMBER: ("targets/prototypes_number", "prototypes_number", "out_dim"),
    records.OUTPUT_STD: ("features/output_std", "output_std"),
    records.OUTPUT_RANK: ("features/output_rank", "output_rank"),
    records.EMBEDDING_STD: ("features/embedding_std", "embedding_std"),
    records.EMBEDDING_RANK: ("features/embedding_rank", "embedding_rank"),
    records.LR: ("schedule/lr", "lr", "learning_rate", "train_lr"),
}
"""What is read of named columns, and the names that it may have, in any case; entropies and losses in nats."""

AT_LN_K = 0.01
"""Relative distance from ln K within which a loss is that of uniform targets."""
LOW = 0.05
"""Loss / ln K, or over its highest where K is not known, below which targets are one-hot and the student has followed:
a run on ImageNet is at 0.25 after 60 epochs (facebookresearch/dino#280)."""
FLAT = 0.005
"""Relative range of a loss that has not moved in the whole log."""
GUESS_NATS = 0.005
"""Distance from ln K within which a plateau is taken for it: less than half the way from any number of GUESSES to the
next."""
GUESSES = tuple(sorted({2**power for power in range(8, 19)} | {1000, 2000, 3000, 5000, 10000, 50000, 60000, 100000}))
"""Numbers of prototypes that are looked for: powers of two, and round ones."""
CERTAIN = 0.05
"""Part of the log for which a loss must stay where it is before a collapse is called."""
FEWEST = 3
"""Records for which it must at least."""


@dataclass(frozen=True)
class Log:
    """A log, with what it is read as."""

    form: Form
    unit: Unit
    """What `step` counts in its records."""
    records: tuple[Record, ...]
    """Those with a loss. An epoch that the log does not tell is NaN."""
    read_as: dict[str, str]
    """By column."""
    unused: tuple[str, ...]
    broken: tuple[tuple[int, str, float], ...]
    """Where a loss, or a part of it, is not finite: step, column, value."""
    notes: tuple[str, ...]
    """What a reader should know of how it was read."""

    @property
    def losses(self) -> list[float]:
        return [record.values[records.LOSS] for record in self.records]


def read(path: Path) -> Log:
    """The log in a file.

    Raises:
        ValueError: there is no such file, it is in no form that is known, or it has no loss; names the line.
    """
    rows = _rows(path)
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    form, found, made = _form(columns)
    if made is None:
        raise ValueError(
            f"{path}: has no loss; needed is a column {_any_of(COLUMNS[records.LOSS])} or {_GLOBAL}, or both "
            f"teacher_entropy and kl; its columns are {', '.join(columns)}"
        )
    clocks: tuple[Unit, ...] = ("step", "iteration", "epoch")
    clock = next((clock for clock in clocks if clock in found), None)
    if clock is None:
        allowed = [name for clock in clocks for name in COLUMNS[clock]]
        raise ValueError(f"{path}: does not say when; needed is a column {_any_of(allowed)}")

    kept: list[Record] = []
    broken: list[tuple[int, str, float]] = []
    skipped, again = 0, 0
    parts = [column for column in columns if column in made.parts or column == _TOTAL]
    for where, row in rows:
        values = _numbers(row, found, where)
        losses = _numbers(row, {column: column for column in parts}, where)
        loss = made.of(losses)
        if clock not in values or loss is None:
            skipped += 1
            continue
        time = values.pop(clock)
        if not time.is_integer():
            raise ValueError(
                f"{where}: {found[clock]} = {time:g} must be a whole number; what is closer has a column step"
            )
        step = int(time)
        while kept and kept[-1].step >= step:
            kept.pop()
            again += 1
        broken = [each for each in broken if each[0] < step]
        broken += [(step, column, value) for column, value in losses.items() if not math.isfinite(value)]
        epoch = time if clock == "epoch" else values.get("epoch", math.nan)
        shown = {name: value for name, value in values.items() if name not in clocks}
        kept.append(Record(step, epoch, math.nan, shown | {records.LOSS: loss}))
    if not kept:
        raise ValueError(f"{path}: no line has both a loss and its {clock}")

    notes = list(made.notes)
    if skipped:
        notes.append(f"{skipped} lines without a loss are left out")
    if again:
        notes.append(f"{again} records are left out: the log goes on from before them, as a run that is taken up again")
    used = dict.fromkeys(made.parts, records.LOSS) | {column: name for name, column in found.items()}
    return Log(
        form=form,
        unit=clock,
        records=tuple(kept),
        read_as={column: used[column] for column in columns if column in used},
        unused=tuple(column for column in columns if column not in used and column not in parts),
        broken=tuple(broken),
        notes=tuple(notes),
    )


def guessed_out_dim(losses: Sequence[float]) -> int | None:
    """K, if the last tenth of the log lies at its logarithm; None where that cannot be said."""
    tail = losses[-max(FEWEST, math.ceil(len(losses) / 10)) :]
    if len(tail) < FEWEST:
        return None
    for out_dim in GUESSES:
        if all(abs(loss - math.log(out_dim)) <= GUESS_NATS for loss in tail):
            return out_dim
    return None


def loss_sign(loss: float, *, out_dim: int | None, highest: float) -> Sign:
    """What one loss looks like: entropy of the targets + KL, which is ln K if they are uniform and the student has
    followed, and 0 if they are one-hot and it has.

    Args:
        highest: The highest loss of the log, to compare with where K is not known.
    """
    if out_dim is not None:
        share = loss / math.log(out_dim)
        if abs(share - 1) <= AT_LN_K:
            bounds: tuple[tuple[Literal["<=", ">="], float], ...] = ((">=", 1 - AT_LN_K), ("<=", 1 + AT_LN_K))
            return Sign("uniform", tuple(Crossed("loss / ln K", share, *bound) for bound in bounds))
    scale, name = (highest, "loss / its highest") if out_dim is None else (math.log(out_dim), "loss / ln K")
    if loss <= LOW * scale:
        return Sign("one_prototype", (Crossed(name, loss / scale, "<=", LOW),))
    return Sign("none")


def loss_signs(log: Log, out_dim: int | None) -> list[tuple[int, Sign]]:
    """Of each record, by its step."""
    highest = max(filter(math.isfinite, log.losses), default=math.nan)
    return [(r.step, loss_sign(r.values[records.LOSS], out_dim=out_dim, highest=highest)) for r in log.records]


def of_loss(log: Log, out_dim: int | None) -> Verdict:
    """The verdict on a loss alone. Three of the kinds do not show in it: constant, few_prototypes and dimensional."""
    diverged = broken_since(log)
    if diverged is not None:
        return Verdict(kind="diverged", onset_step=diverged)
    span = log.records[-1].step - log.records[0].step
    runs = [
        [(kind, step) for step, _ in run] for kind, run in groupby(loss_signs(log, out_dim), lambda each: each[1].kind)
    ]
    left: list[Any] = []
    for run, following in zip(runs, [*runs[1:], None], strict=True):
        kind, first = run[0]
        if kind == "none" or len(run) < FEWEST or run[-1][1] - first < CERTAIN * span:
            continue
        if following is None:
            return Verdict(kind=kind, onset_step=first, left=tuple(left))
        left.append((kind, first, following[0][1]))
    losses = log.losses
    if len(losses) >= FEWEST and max(losses) - min(losses) <= FLAT * abs(losses[0]) and not left:
        return Verdict(kind="not_started", onset_step=log.records[0].step)
    return Verdict(left=tuple(left))


def broken_since(log: Log) -> int | None:
    """The step from which on no loss is finite, to the end of the log."""
    steps = {step for step, _, _ in log.broken}
    since = None
    for record in reversed(log.records):
        if record.step not in steps:
            break
        since = record.step
    return since


# ------------------------------------------------------------------------------------------------- how losses add up


@dataclass(frozen=True)
class _Made:
    """How the mean cross-entropy over pairs of different crops, the loss of DINO, is made of columns."""

    parts: tuple[str, ...]
    weights: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def of(self, values: Mapping[str, float]) -> float | None:
        """None where a part is missing."""
        if any(part not in values for part in self.parts):
            return None
        return sum(weight * values[part] for part, weight in zip(self.parts, self.weights, strict=True))


_LOCAL, _GLOBAL = "dino_local_crops_loss", "dino_global_crops_loss"
_SMOOTHED = "each value is the median of the last 20 iterations: what it shows began up to ten before"
_TOTAL = "total_loss"
_REST = "koleo_loss, ibot_loss and what else is in total_loss are left aside"


def _form(columns: Sequence[str]) -> tuple[Form, dict[str, str], _Made | None]:
    """Whose log it is, the column of each name of COLUMNS that is there, and how the loss is made."""
    lower = {column.lower(): column for column in reversed(columns)}
    found = {
        name: lower[alias]
        for name, aliases in COLUMNS.items()
        if (alias := next((alias for alias in aliases if alias in lower), None))
    }
    if _GLOBAL in columns:
        found.pop(records.LOSS, None)
        return (
            ("DINOv3", found, _dinov3()) if "dino_local_loss_weight" in columns else ("DINOv2", found, _dinov2(columns))
        )
    if loss := found.pop(records.LOSS, None):
        official = {"train_loss", "train_lr", "epoch"} <= set(columns)
        return "DINO" if official else "named columns", found, _Made((loss,), (1.0,))
    parts = [found[name] for name in (records.TEACHER_ENTROPY, records.KL) if name in found]
    if len(parts) == 2:
        note = "the loss is the sum of teacher entropy and KL"
        return "named columns", found, _Made(tuple(parts), (1.0, 1.0), (note,))
    return "named columns", found, None


def _dinov2(columns: Sequence[str]) -> _Made:
    """With G = 2 global and L local crops both parts are sums over pairs, divided by the number of all pairs, so that
    their sum is the mean over pairs. Without local crops, one pair too many is counted: it is 2/3 of the mean.

    Source: dinov2/train/ssl_meta_arch.py, forward_backward; dinov2/logging/helpers.py.
    """
    if _LOCAL in columns:
        note = f"{_LOCAL} and {_GLOBAL} are shares of one mean over pairs of crops: their sum is the DINO loss"
        return _Made((_LOCAL, _GLOBAL), (1.0, 1.0), (note, _REST, _SMOOTHED))
    note = f"without local crops {_GLOBAL} is two thirds of the mean over pairs of crops: 3/2 of it is the DINO loss"
    return _Made((_GLOBAL,), (1.5,), (note, _REST, _SMOOTHED))


def _dinov3() -> _Made:
    """Both parts are means over their own pairs; how many local crops weigh them in the total, the log does not tell.

    Source: dinov3/train/ssl_meta_arch.py, compute_losses; dinov3/loss/dino_clstoken_loss.py.
    """
    note = (
        f"{_LOCAL} and {_GLOBAL} are each a mean over pairs of crops of its own; half of each is taken, since the log "
        "does not tell the number of local crops that weighs them"
    )
    return _Made((_LOCAL, _GLOBAL), (0.5, 0.5), (note, _REST, _SMOOTHED))


# -------------------------------------------------------------------------------------------------------------- rows


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows as they stand in the file, and where."""
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not text; needed are JSON lines or a CSV") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: is empty")
    read_rows = _json_rows if lines[0][1].lstrip().startswith("{") else _csv_rows
    rows = list(read_rows(lines, path, whole=text.endswith("\n")))
    if not rows:
        raise ValueError(f"{path}: has names of columns and no line below them")
    return rows


def _json_rows(lines: Sequence[tuple[int, str]], path: Path, *, whole: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == lines[-1][0] and not whole:  # is being written
                return
            raise ValueError(f"{where}: is not JSON, as the lines before it are") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where}: must be a JSON object, as in {{"train_loss": 9.6, "epoch": 1}}')
        yield where, row


def _csv_rows(lines: Sequence[tuple[int, str]], path: Path, *, whole: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    header, *cells = csv.reader(line for _, line in lines)
    names = [name.strip() for name in header]
    if len(names) < 2 or any(_is_number(name) for name in names):
        raise ValueError(
            f"{path}, line {lines[0][0]}: neither a JSON object nor the names of a CSV's columns. Official DINO writes "
            "its log to log.txt, DINOv2 and DINOv3 to training_metrics.json"
        )
    for (number, _), row in zip(lines[1:], cells, strict=True):
        where = f"{path}, line {number}"
        if len(row) != len(names):
            if number == lines[-1][0] and not whole:
                return
            raise ValueError(f"{where}: has {len(row)} cells, and {len(names)} columns have a name")
        yield where, dict(zip(names, row, strict=True))


def _numbers(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, float]:
    """What the row has of these columns, by their names here; nothing where a cell is empty."""
    numbers = {}
    for name, column in columns.items():
        value = row.get(column)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not _is_number(value):
            raise ValueError(f"{where}: {column} = {value!r} must be a number")
        numbers[name] = float(value)
    return numbers


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _any_of(names: Iterable[str]) -> str:
    return " or ".join(names)
