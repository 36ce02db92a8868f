"""What the commands show: tables and lines of trials and records, live while they change."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.live import Live
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from dino_lab.core import records

if TYPE_CHECKING:
    from dino_lab.ablation import Ablation, LabelledTrial
    from dino_lab.advice import Advice
    from dino_lab.core.records import Record
    from dino_lab.core.settings import Knob
    from dino_lab.doctor import Finding
    from dino_lab.explaining import Diagnosis, Explanation
    from dino_lab.lint import RowsFinding
    from dino_lab.orchestration.runner import Progress
    from dino_lab.orchestration.status import TrialStatus
    from dino_lab.space import Search

_CLASSES_SHOWN = 20
Show: TypeAlias = "Callable[[Progress], None]"

_COLORS = {
    "running": "cyan",
    "finished": "green",
    "ok": "green",
    "interrupted": "yellow",
    "stopped": "yellow",
    "warn": "yellow",
    "warning": "yellow",
    "diverged": "magenta",
    "failed": "red",
    "fail": "red",
}


@contextlib.contextmanager
def following(out: Console) -> Iterator[Show]:
    """Shows progress: a live table in a terminal, else a line for each change that matters."""
    if not out.is_terminal:
        yield _news()
        return
    with Live(console=out, transient=True, auto_refresh=False) as live:
        yield _InPlace(live)


@contextlib.contextmanager
def counting() -> Iterator["Callable[[int, int], None]"]:
    """Shows that data is being read, and how many images, where that is told."""
    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading data", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def data_table(facts: "Mapping[str, Mapping[str, str | int]]") -> Table:
    """What is trained on and judged by, a role a line."""
    table = Table("", "images", "classes", "size", "SHA-256", "from", box=None)
    for role, of in facts.items():
        digest = str(of["digest"])[:16]
        table.add_row(role, f"{of['images']:,}", str(of["classes"]), str(of["size"]), digest, str(of["source"]))
    return table


def class_table(counts: "Mapping[str, Mapping[str, int]]") -> Table:
    """Images of each class, by role; of many classes the first."""
    classes = list(dict.fromkeys(name for of in counts.values() for name in of))
    table = Table("class", *counts, box=None)
    for name in classes[:_CLASSES_SHOWN]:
        table.add_row(name, *(f"{of.get(name, 0):,}" for of in counts.values()))
    if len(classes) > _CLASSES_SHOWN:
        table.add_row(f"and {len(classes) - _CLASSES_SHOWN} more")
    return table


def plan_table(ablation: "Ablation", first: "Mapping[str, LabelledTrial]", trials: "Sequence[TrialStatus]") -> Table:
    """A row of the ablation a line: what it changes, dim what comes with a changed kind, and its trials.

    `first` has a trial of each row, whose values are shown.
    """
    from dino_lab.ablation import meaning  # here, since --help need not wait for pydantic

    seeds = dict.fromkeys(trial.seed for trial in trials)
    table = Table("row", "changes", *(f"seed {seed}" for seed in seeds), box=None)
    for row in ablation.rows:
        made = first[row.label]
        changes = [f"{knob} = {meaning(value, made.changes[knob])}" for knob, value in row.changes.items()]
        changes += [f"[dim]{knob} = {meaning(value)}[/]" for knob, value in made.implied.items()]
        text = "\n".join(changes) or "-"
        table.add_row(row.label, text, *(f"{t.trial_id} {_colored(t.state)}" for t in trials if t.row == row.label))
    return table


def space_table(search: "Search") -> Table:
    """What a search varies, what it is judged by, and its budget."""
    from dino_lab.space import Between  # here, since --help need not wait for pydantic

    table = Table("knob", "from", "to", "", box=None)
    for name, each in search.distributions.items():
        if isinstance(each, Between):
            how = "logarithmic" if each.log else f"in steps of {each.step:g}" if each.step else ""
            table.add_row(name, f"{each.low:g}", f"{each.high:g}", how)
        else:
            table.add_row(name, "", "", "one of " + ", ".join(map(str, each.choices)))
    budget = [f"{search.trials} trials"] if search.trials else []
    budget += [f"{search.hours:g} hours"] if search.hours else []
    table.caption = f"by {', '.join(search.objectives)}; sampler {search.sampler}, pruner {search.pruner}" + (
        f"; at most {', '.join(budget)}" if budget else ""
    )
    table.caption_justify = "left"
    return table


def trial_table(trials: "Sequence[TrialStatus]") -> Table:
    """A trial a line: how far it is, and what it shows."""
    table = Table("row", "seed", "state", "epoch", "entropy/ln K", "k-NN", "collapse", "time", box=None)
    for trial in trials:
        onset = "" if trial.onset_step is None else f" from step {trial.onset_step}"
        before = "".join(f", {kind} {first} to {last}" for kind, first, last in trial.left)
        table.add_row(
            trial.row,
            str(trial.seed),
            _colored(trial.state),
            "-" if trial.epoch is None else f"{trial.epoch:.1f}/{trial.epochs}",
            "-" if trial.entropy_fraction is None else f"{trial.entropy_fraction:.2f}",
            "-" if trial.knn is None else f"{trial.knn:.1f} %",
            "-" if trial.step is None else f"{trial.verdict}{onset}{before}",
            "-" if trial.seconds is None else duration(trial.seconds),
        )
    return table


def findings_table(findings: "Sequence[Finding]") -> Table:
    """What doctor found, and what to do."""
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row(_colored(finding.state), finding.what, finding.found, finding.advice)
    return table


def lint_table(found: "Sequence[RowsFinding]", rows: "Sequence[str]") -> Table:
    """What is known to go wrong, a rule at a time: with which knobs, in which of all these rows, by whom, and here."""
    from dino_lab.ablation import meaning  # here, since --help need not wait for pydantic

    table = Table(box=None, show_header=False, pad_edge=False)
    for (severity, rule), group in groupby(found, key=lambda each: (each.finding.severity, each.finding.rule)):
        text = Text()
        for reason, alike in groupby(group, key=lambda each: each.finding.reason):
            for each in alike:
                finding = each.finding
                where = "all rows" if set(each.rows) == set(rows) else f"row {', '.join(each.rows)}"
                knobs = ", ".join(f"{knob} = {meaning(value)}" for knob, value in finding.knobs.items())
                text.append(f"{where}: {knobs}\n" if len(rows) > 1 else f"{knobs}\n")
            text.append(f"{reason}\n")
        text.append(f"source: {finding.source}\nhere: {finding.seen_here}", style="dim")
        table.add_row(_colored(severity), rule, text)
    return table


def record_line(record: "Record") -> str:
    """A record without what is scheduled; the journal has all of it."""
    values = [
        f"{name.rsplit('/', 1)[-1]} {value:.4g}"
        for name, value in record.values.items()
        if name.startswith(("train/", "eval/", "runtime/"))
    ]
    onset = "" if record.onset_step is None else f" from step {record.onset_step}"
    return "  ".join([f"step {record.step}", f"epoch {record.epoch:.2f}", *values, f"collapse {record.verdict}{onset}"])


def explained_lines(said: "Explanation | Diagnosis") -> list[str]:
    """What happened to a trial or to a run of others, in words: verdict, evidence, what to try."""
    from dino_lab.explaining import Explanation  # here, since --help need not wait for pydantic

    return _explanation_lines(said) if isinstance(said, Explanation) else _diagnosis_lines(said)


def counts(trials: "Sequence[TrialStatus]") -> str:
    """How many trials are in each state, and have collapsed."""
    from dino_lab.orchestration.status import counts  # here, since --help need not wait for it

    return ", ".join(f"{number} {state}" for state, number in counts(trials).items() if number)


def duration(seconds: float) -> str:
    """Rounded, in the unit that people would use."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _InPlace:
    """Draws the table over the last one."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def __call__(self, progress: "Progress") -> None:
        self._live.update(_live_table(progress, self._live.console.height), refresh=True)


def _live_table(progress: "Progress", height: int) -> Table:
    trials = progress.trials
    fit = len(trials) + 5 < height
    table = trial_table(trials if fit else [trial for trial in trials if trial.state in ("running", "failed")])
    lines = [counts(trials)]
    if progress.seconds_left:
        lines.append(f"about {duration(progress.seconds_left)} left")
    if progress.retries:
        lines.append(f"{progress.retries} attempts taken up again")
    if progress.mirror_error:
        lines.append(f"MLflow is behind, nothing is lost: {progress.mirror_error.splitlines()[0]}")
    table.caption = "\n".join(lines)
    return table


def _news() -> Show:
    """Prints a line when a trial changes its state, is evaluated, or collapses."""
    said: set[str] = set()

    def show(progress: "Progress") -> None:
        for trial in progress.trials:
            knn = "" if trial.knn is None else f", k-NN {trial.knn:.1f} %, collapse {trial.verdict}"
            line = f"{trial.row}, seed {trial.seed}: {trial.state}{knn}"
            if line not in said and trial.state != "waiting":
                said.add(line)
                print(line, flush=True)

    return show


def _colored(state: str) -> str:
    return f"[{_COLORS.get(state, 'dim')}]{state}[/]"


def _explanation_lines(said: "Explanation") -> list[str]:
    lines = [f"trial {said.trial_id}: {said.title}", *_meaning(said.kind)]
    of = "" if said.steps is None else f" of {said.steps:,}"
    lines.append(f"  {said.state} after {said.step:,} steps{of}, {said.records} records")
    if said.error:
        lines.append(f"  {said.error.strip().splitlines()[-1]}")
    if said.recorded != said.kind:
        lines.append(f"  its journal has {said.recorded}, by the bounds and rules of its day")
    if said.knn is not None:
        lines.append(f"  k-NN of the class {said.knn[0]:.1f} % at first, {said.knn[1]:.1f} % at last")
    lines += _common_lines(said, "step")
    if said.findings:
        lines.append("what the linter has against its knobs:")
        for each in said.findings:
            lines += [f"  {each.severity} {each.rule}: {each.reason}", f"    source: {each.source}"]
    return lines + _advice_lines(said.advice, said.kind, with_changes=True)


def _diagnosis_lines(said: "Diagnosis") -> list[str]:
    prototypes = "" if said.out_dim is None else f", K = {said.out_dim:,} ({said.out_dim_is})"
    lines = [f"{said.path}: {said.title}", *_meaning(said.kind)]
    lines.append(
        f"  a log of {said.form}: {said.records} records from {said.unit} {said.first_step:,} to "
        f"{said.last_step:,}{prototypes}; "
        f"judged by {'its targets' if said.judged_by == 'targets' else 'its loss alone'}"
    )
    lines += _common_lines(said, said.unit)
    lines += [f"  note: {note}" for note in said.notes]
    if said.unknown:
        lines.append("what it cannot tell:")
        lines += [f"  {each}" for each in said.unknown]
    lines += _advice_lines(said.advice, said.kind, with_changes=False)
    lines.append(f"read: {', '.join(f'{column} as {name}' for column, name in said.read_as.items())}")
    return lines + ([f"not used: {', '.join(said.unused)}"] if said.unused else [])


def _meaning(kind: str) -> list[str]:
    return [] if kind == "none" else [f"  {records.VERDICTS[kind]}"]


def _common_lines(said: "Explanation | Diagnosis", unit: str) -> list[str]:
    lines = [f"evidence, by {unit}:", *(f"  {each}" for each in said.evidence)] if said.evidence else []
    if said.first_sign:
        kind, step = said.first_sign
        lines.append(f"  its first sign was of {kind}, at {unit} {step:,}")
    return lines + [
        f"  was {past.kind} from {unit} {past.first_step:,} to {past.last_step:,}, and left it" for past in said.left
    ]


def _advice_lines(advice: "Sequence[Advice]", kind: str, *, with_changes: bool) -> list[str]:
    if not advice:
        return (
            ["nothing is known to try with these knobs"]
            if kind in (*records.COLLAPSES, "diverged", "not_started")
            else []
        )
    lines = ["what to try:"]
    for each in advice:
        lines += [f"  {each.when}: {each.what}", f"    {each.why}", f"    source: {each.source}"]
        if with_changes and each.changes:
            lines.append("    " + " ".join(f"--set {knob}={_typed(value)}" for knob, value in each.changes.items()))
    return lines


def _typed(value: "Knob") -> str:
    """As it is typed behind `--set knob=`."""
    return value if isinstance(value, str) else json.dumps(value)
