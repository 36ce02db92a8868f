"""The commands: parse, call, print.

Whatever takes long to import is imported by the command that needs it, so that --help and list answer at once.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeAlias, cast

import typer
from rich.console import Console

from dino_lab import asking, preparing, terminal
from dino_lab.asking import DEFAULT_BASELINE, DEFAULT_LAB, Asked
from dino_lab.tracking_uri import without_password

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dino_lab.ablation import Ablation, LabelledTrial
    from dino_lab.core.records import Record
    from dino_lab.core.trial import Trial
    from dino_lab.explaining import Diagnosis, Explanation
    from dino_lab.lint import RowsFinding
    from dino_lab.orchestration.runner import Summary
    from dino_lab.orchestration.status import TrialStatus
    from dino_lab.orchestration.tracking import Sweep
    from dino_lab.space import Search

Form: TypeAlias = Literal["timm", "official"]

OFFLINE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "DO_NOT_TRACK": "true",
    "HF_HUB_OFFLINE": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Nothing is sent home or fetched, unless the person's environment says so."""

app = typer.Typer(
    help="A laboratory for DINO self-distillation: sweeps, collapse, and the paper's ablation tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

Name = Annotated[str, typer.Argument(help="An experiment of `list`.", show_default=False)]
Changes = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KNOB=VALUE",
        help="Change a knob for every row; may be repeated.",
        default_factory=list,
        show_default=False,
    ),
]
Baseline = Annotated[str, typer.Option(help="What the rows start from; see `list`.")]
Seeds = Annotated[str, typer.Option(help="As in 0,1,2; the experiment's own by default.", show_default=False)]
Lab = Annotated[Path, typer.Option(help="The folder that holds everything.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a data set that is not there; else nothing is.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse to start where the linter warns.")]
Concurrency = Annotated[
    int | None, typer.Option(min=1, help="Trials at a time; as many as fit by default.", show_default=False)
]
Address = Annotated[
    str | None, typer.Option(help="A running Ray cluster; a private one by default.", show_default=False)
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        envvar="MLFLOW_TRACKING_URI",
        help="An MLflow server (http://), postgresql:// or sqlite:///; the lab's own store by default.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


def main() -> None:
    """The entry point of `dino-lab`."""
    for switch, value in OFFLINE.items():
        os.environ.setdefault(switch, value)
    app(prog_name=_program())


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show what can be asked: experiments and baselines."""
    notes, baselines = asking.experiments(), asking.baselines()
    if as_json:
        _print_json({"experiments": notes, "baselines": baselines})
        return
    for name, note in notes.items():
        out.print(f"{name:<24}{note.splitlines()[0]}")
    out.print(f"\nbaselines: {', '.join(baselines)}")
    _print_next(f"plan {next(iter(notes))}")


@app.command()
def plan(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    lab: Lab = DEFAULT_LAB,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Show an experiment's trials, which of them are done, and what is left; start nothing."""
    asked = _ask(name, changes, baseline, seeds, lab, strict=strict, reading=True)
    found = preparing.findings(_rows(asked), strict=False)
    from dino_lab.orchestration.status import status

    trials = status(lab, asked.labelled)
    (_plan_search if asked.start else _plan_ablation)(asked, trials, found, as_json=as_json)
    if not as_json:
        _print_next(f"run {name}", _options(changes, baseline, seeds, lab))


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="A data set, as in data.kind.", show_default=False)],
    changes: Changes,
    baseline: Annotated[str, typer.Option(help="Whose crops are shown; see `list`.")] = DEFAULT_BASELINE,
    download: Download = False,
    lab: Lab = DEFAULT_LAB,
    as_json: AsJson = False,
) -> None:
    """Show a data set: images, classes, sizes and digest, and a picture of what student and teacher see."""
    with _told():
        overrides = asking.parse_changes(changes)
        asking.check_lab(lab)
        trial = asking.find_baseline(baseline).but({"data.kind": name, **overrides})
        from dino_lab.contact_sheet import contact_sheet
        from dino_lab.core.data.encoded import told
        from dino_lab.core.evaluation import opened

        with terminal.counting() as progress:
            (trial,) = preparing.prepared([trial], lab, progress=progress, download=download)
        images, evaluation = opened(trial, preparing.data_dir(lab))
        splits = {"training": images, **evaluation.images}
        sheet = preparing.data_dir(lab) / f"{images.name}-{images.digest[:8]}.png"
        contact_sheet(images, trial.crops, rows=8, seed=trial.seed).save(sheet)
    facts = {role: images.facts for role, images in splits.items()}
    counts = {role: images.class_counts for role, images in splits.items()}
    skipped = {name: why for images in splits.values() for name, why in images.skipped.items()}
    if as_json:
        _print_json({"splits": facts, "class_counts": counts, "skipped": skipped, "sheet": str(sheet)})
        return
    out.print(terminal.data_table(facts))
    if evaluation.images:
        out.print(terminal.class_table(counts))
    if skipped:
        out.print(f"{len(skipped)} images are left out:")
    for line in told(skipped):
        out.print(line, markup=False)
    print(sheet)


@app.command()
def train(
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    download: Download = False,
    lab: Lab = DEFAULT_LAB,
    strict: Strict = False,
) -> None:
    """Train one trial here, without Ray, and show its records; go on where it stopped."""
    with _told():
        overrides = asking.parse_changes(changes)
        asking.check_lab(lab)
        trial = asking.find_baseline(baseline).but(overrides | {"runtime.data_dir": str(preparing.data_dir(lab))})
        preparing.findings([("", trial)], strict=strict)  # before any work, by what is known
        asking.check_machine([trial])
        with terminal.counting() as progress:
            (trial,) = preparing.prepared([trial], lab, progress=progress, download=download)
        found = preparing.findings([("", trial)], strict=strict, read_in=lab)
        import torch

        from dino_lab.orchestration.folder import TrialFolder, run_trial

        torch.set_num_threads(trial.runtime.cpus)
        folder = TrialFolder(lab, trial.identity)
        out.print(f"trial {trial.identity}, {trial.epochs} epochs, in {folder.path}")
        _print_found(found, [""])
        try:
            for record in run_trial(trial, lab):
                out.print(terminal.record_line(record), soft_wrap=True)
        except KeyboardInterrupt:
            out.print("stopped; the same command again goes on from the last checkpoint")
            raise typer.Exit(130) from None
    if end := folder.end():
        out.print(f"{end.state} after {terminal.duration(end.seconds)}{f': {end.error}' if end.error else ''}")


@app.command()
def run(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    download: Download = False,
    lab: Lab = DEFAULT_LAB,
    concurrency: Concurrency = None,
    address: Address = None,
    tracking_uri: TrackingUri = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Run an experiment's trials; a second time go on with what is unfinished."""
    asked = _ask(name, changes, baseline, seeds, lab, training=True, download=download, address=address, strict=strict)
    with _told():
        found = preparing.findings(_rows(asked), strict=strict, read_in=lab)
    if not as_json:
        _print_found(found, [row for row, _ in _rows(asked)])
    summary = _run(asked, concurrency=concurrency, address=address, tracking_uri=tracking_uri, quiet=as_json)
    if as_json:
        facts = _facts(asked) | dataclasses.asdict(summary)
        _print_json(facts | {"notes": summary.notes, "findings": _plain(found)})
    else:
        store = _store_option(tracking_uri)
        _print_next(f"report {name}", _options(changes, baseline, seeds, lab) + store)
        _print_next("ui", _options([], DEFAULT_BASELINE, "", lab) + store)
    raise typer.Exit(_exit_code(summary))


@app.command()
def retry(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    lab: Lab = DEFAULT_LAB,
    concurrency: Concurrency = None,
    address: Address = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Run the failed trials of an experiment once more, each from its last checkpoint, and no others."""
    asked = _ask(name, changes, baseline, seeds, lab, training=True, address=address)
    if asked.start:
        _fail(f"{name} is a search: it asks for other trials in place of those that failed")
    summary = _run(asked, concurrency=concurrency, address=address, tracking_uri=tracking_uri, only_failed=True)
    raise typer.Exit(int(any(trial.state == "failed" for trial in summary.trials)))


@app.command()
def stop(name: Name, lab: Lab = DEFAULT_LAB) -> None:
    """End the run of an experiment, wherever it was started, as Ctrl-C there does; `run` goes on with it."""
    from dino_lab.orchestration import runner

    with _told(), out.status("waiting for the run to end"):
        asking.check_lab(lab)
        runner.stop(name, lab)
    out.print("stopped; the same command again goes on where each trial was")


@app.command()
def prune(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    lab: Lab = DEFAULT_LAB,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete the checkpoints of an experiment's finished trials, never a record."""
    asked = _ask(name, changes, baseline, seeds, lab)
    from dino_lab.orchestration.status import prunable

    folders = prunable(lab, asked.labelled)
    if not folders:
        out.print("no checkpoints of finished trials")
        return
    mib = sum(folder.checkpoint_bytes for folder in folders) / 2**20
    out.print(
        f"{len(folders)} checkpoints of finished trials, {mib:.1f} MiB: without them `look` and `export` show nothing "
        "of these trials, and no trial can start from them; records, tables and reports stay"
    )
    if not yes:
        typer.confirm("delete them?", abort=True)
    for folder in folders:
        folder.prune()
    out.print(f"{mib:.1f} MiB are free")


@app.command()
def sync(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    lab: Lab = DEFAULT_LAB,
    tracking_uri: TrackingUri = None,
) -> None:
    """Bring MLflow up to the trials' journals: send every record that it lacks, and settle every run."""
    asked = _ask(name, changes, baseline, seeds, lab)
    if asked.start and not asked.study:
        _fail(f"{name} has not been searched in {lab}")
    with _told():
        from dino_lab.orchestration import runner

        error = runner.sync(_sweep(asked), lab=lab, tracking_uri=tracking_uri)
    if error:
        out.print(f"MLflow is behind, nothing is lost: {error}", markup=False)
        raise typer.Exit(1)
    out.print(f"MLflow has every record of {len(asked.labelled)} trials")


@app.command()
def status(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    lab: Lab = DEFAULT_LAB,
    as_json: AsJson = False,
) -> None:
    """Show where each trial of an experiment stands, from any terminal, also while it runs."""
    asked = _ask(name, changes, baseline, seeds, lab, reading=True)
    from dino_lab.orchestration.status import counts, seconds_left, status

    trials = status(lab, asked.labelled)
    left = seconds_left(trials)
    if as_json:
        summed = {"counts": counts(trials), "seconds_left": left}
        _print_json(_facts(asked) | summed | {"trials": [dataclasses.asdict(trial) for trial in trials]})
        return
    out.print(terminal.trial_table(trials))
    out.print(terminal.counts(trials) + (f"; about {terminal.duration(left)} left" if left else ""))


@app.command()
def report(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    lab: Lab = DEFAULT_LAB,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write an experiment's tables, figures and report from MLflow's record."""
    _report(_ask(name, changes, baseline, seeds, lab), tracking_uri)


@app.command()
def ui(
    lab: Lab = DEFAULT_LAB,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 0,
    tracking_uri: TrackingUri = None,
) -> None:
    """Serve the records in MLflow's dashboard, to this machine only, until Ctrl-C; of a server only say the address."""
    from dino_lab import dashboard

    with _told():
        dashboard.show(lab, port, lambda line: out.print(line, soft_wrap=True), tracking_uri=tracking_uri)


@app.command()
def export(
    trial_id: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's id, as in `plan`.", show_default=False)],
    form: Annotated[
        Form, typer.Option("--format", help="A folder that timm loads, or a checkpoint as the reference writes it.")
    ] = "timm",
    to: Annotated[
        Path | None, typer.Option(help="By default exports/TRIAL-FORMAT in the lab.", show_default=False)
    ] = None,
    lab: Lab = DEFAULT_LAB,
) -> None:
    """Write a trial's networks for use elsewhere; the teacher's, or the student's if it has no teacher."""
    with _told():
        trial = asking.find_trial(trial_id, lab)
        from dino_lab.core.export import export
        from dino_lab.orchestration.folder import TrialFolder

        folder = TrialFolder(lab, trial_id)
        suffix = "" if form == "timm" else ".pth"
        target = to or lab / "exports" / f"{trial_id}-{form}{suffix}"
        try:
            files = export(trial, folder.checkpoint, target, form=form)
        except RuntimeError as error:
            _fail(str(error))
    if folder.state() != "finished":
        out.print(f"the trial is {folder.state()}: these are the networks of its last checkpoint")
    for path in files:
        print(path)


@app.command()
def explain(
    trial_id: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's id, as in `plan`.", show_default=False)],
    lab: Lab = DEFAULT_LAB,
    as_json: AsJson = False,
) -> None:
    """Say what happened to a trial: its verdict, the evidence, and what to try, each with its source."""
    from dino_lab import explaining

    with _told():
        said, shown = explaining.explain(trial_id, lab)
    _show_explained(said, shown, lab=lab, name=trial_id, unit="step", as_json=as_json)


@app.command()
def diagnose(
    log: Annotated[
        Path, typer.Argument(metavar="FILE", help="A log of DINO, DINOv2 or DINOv3, or a CSV.", show_default=False)
    ],
    out_dim: Annotated[
        int | None, typer.Option(min=2, help="K, the number of prototypes; else guessed.", show_default=False)
    ] = None,
    lab: Lab = DEFAULT_LAB,
    as_json: AsJson = False,
) -> None:
    """Say what happened in a run that others logged, as far as its log tells."""
    from dino_lab import explaining

    with _told():
        asking.check_lab(lab)
        said, shown = explaining.diagnose(log, out_dim=out_dim)
    _show_explained(said, shown, lab=lab, name=log.stem, unit=said.unit, as_json=as_json)


@app.command()
def look(
    trial_ids: Annotated[list[str], typer.Argument(metavar="TRIAL...", help="Trials' ids.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="Images whose attention is shown.")] = 6,
    lab: Lab = DEFAULT_LAB,
) -> None:
    """Draw what trained networks show of images: attention side by side, prototypes' nearest images, means of classes.

    Attention is of all trials, beside the untrained network; the rest of the first alone, where it has it.
    """
    from analysis import figures, looks
    from dino_lab import looking

    first = trial_ids[0]
    with _told():
        for trial_id in trial_ids:
            asking.find_trial(trial_id, lab)
    pictures: dict[str, Callable[[], Figure]] = {
        "attention": lambda: looks.attention(looking.attention(trial_ids, lab, rows=rows)),
        "prototypes": lambda: looks.prototypes(looking.prototypes(first, lab)),
        "classes": lambda: looks.class_means(looking.class_means(first, lab)),
    }
    folder = lab / "looks" / "-".join(trial_ids)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in pictures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # that of an earlier checkpoint, if none can be drawn now
        try:
            path.write_bytes(figures.render(draw(), "png"))
            print(path)
            drawn.append(path)
        except (ValueError, RuntimeError) as error:  # also of a checkpoint that is no whole one
            out.print(f"no picture of {name}: {str(error).splitlines()[0]}", markup=False, soft_wrap=True)
    if not drawn:
        raise typer.Exit(1)


@app.command()
def doctor(lab: Lab = DEFAULT_LAB, as_json: AsJson = False) -> None:
    """Look at this machine and the lab folder, and say what is wrong."""
    from dino_lab.doctor import examine

    findings = examine(lab)
    if as_json:
        _print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        out.print(terminal.findings_table(findings))
    raise typer.Exit(int(any(finding.state == "fail" for finding in findings)))


@app.command()
def demo(lab: Lab = DEFAULT_LAB) -> None:
    """Run the paper's collapse study (Figure 7) in minutes, and draw its table and figure."""
    start = time.monotonic()
    asked = _ask("collapse", [], DEFAULT_BASELINE, "", lab, training=True)
    out.print(asked.note, "\n", markup=False)
    summary = _run(asked)
    if code := _exit_code(summary):
        raise typer.Exit(code)
    _report(asked)
    out.print(f"\ndone in {terminal.duration(time.monotonic() - start)}; open report.html first")
    _print_next("ui", _options([], DEFAULT_BASELINE, "", lab))
    _print_next("plan teacher_temperature", _options([], DEFAULT_BASELINE, "", lab))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def test(context: typer.Context) -> None:
    """Run the test suite; arguments go to pytest."""
    root = Path(__file__).parents[1]
    if not (root / "tests").exists() or not find_spec("pytest"):
        _fail("the tests are in a clone of the repository: run `python3 -m dino_lab test` there")
    # Ray's tests start clusters, one at a time.
    passes = [context.args] if context.args else [["-m", "not ray and not faults", "-n", "2"], ["-m", "ray"]]
    pytest = [sys.executable, "-m", "pytest"]
    codes = [subprocess.run(pytest + arguments, cwd=root, check=False).returncode for arguments in passes]
    raise typer.Exit(int(any(codes)))


# -------------------------------------------------- what commands have in common


def _ask(
    name: str,
    changes: Sequence[str],
    baseline: str,
    seeds: str,
    lab: Path,
    *,
    training: bool = False,
    download: bool = False,
    address: str | None = None,
    strict: bool = False,
    reading: bool = False,
) -> Asked:
    """What was asked for; before training, this machine is looked at, unless a cluster trains, and data made ready.

    Strict refuses first, by what is known without the data.
    """
    with _told():
        asked = asking.ask(name, baseline=baseline, changes=changes, seeds=seeds, lab=lab, reading=reading)
        if strict:
            preparing.findings(_rows(asked), strict=True)
        if training:
            if address is None:
                asking.check_machine(trial for _, trial in _rows(asked))
            with terminal.counting() as progress:
                return preparing.with_data(asked, progress=progress, download=download)
        asked, notes = preparing.with_known_data(asked)
        for note in notes:
            print(f"dino_lab: {note}", file=sys.stderr)
        return asked


def _rows(asked: Asked) -> "list[tuple[str, Trial]]":
    """Of a search what all its trials have in common."""
    return [("every trial", asked.start)] if asked.start else [(each.row, each.trial) for each in asked.labelled]


def _ablation(asked: Asked) -> "Ablation":
    return cast("Ablation", asked.experiment)


def _plan_ablation(
    asked: Asked, trials: "Sequence[TrialStatus]", found: "Sequence[RowsFinding]", *, as_json: bool
) -> None:
    # Two rows may share a trial; it is computed once.
    left = {trial.trial_id for trial in trials if trial.is_open or trial.state == "failed"}
    ended = [trial.seconds for trial in trials if trial.seconds and trial.trial_id not in left]
    seconds = sum(ended) / len(ended) * len(left) if ended else None
    first: dict[str, LabelledTrial] = {}
    for each in asked.labelled:  # values that stand for others are shown as they are with the first seed
        first.setdefault(each.row, each)
    if as_json:
        rows = [{"row": each.row, "changes": each.changes, "implied": each.implied} for each in first.values()]
        work = {"left": len(left), "seconds_left": seconds, "findings": _plain(found)}
        _print_json(_facts(asked) | {"rows": rows, "trials": [dataclasses.asdict(trial) for trial in trials]} | work)
        return
    out.print(asked.note, "\n", markup=False)
    out.print(terminal.plan_table(_ablation(asked), first, trials))
    _print_found(found, list(first))
    cost = "time unknown until one has ended" if seconds is None else f"about {terminal.duration(seconds)} one by one"
    out.print(f"\n{len(trials)} trials on {asked.baseline_name}, {len(left)} to do: {cost}")


def _plan_search(
    asked: Asked, trials: "Sequence[TrialStatus]", found: "Sequence[RowsFinding]", *, as_json: bool
) -> None:
    search = cast("Search", asked.experiment)
    if as_json:
        space = {name: repr(each) for name, each in search.distributions.items()}
        _print_json(
            _facts(asked)
            | {
                "space": space,
                "objectives": list(search.objectives),
                "budget": {"trials": search.trials, "hours": search.hours},
                "sampler": search.sampler,
                "pruner": search.pruner,
                "fixed": dict(search.fixed),
                "trials": [dataclasses.asdict(trial) for trial in trials],
                "findings": _plain(found),
            }
        )
        return
    out.print(asked.note, "\n", markup=False)
    out.print(terminal.space_table(search))
    _print_found(found, ["every trial"])
    if trials:
        out.print(f"\nso far {terminal.counts(trials)}")


def _print_found(found: "Sequence[RowsFinding]", rows: Sequence[str]) -> None:
    if found:
        out.print("\nwhat is known to go wrong with these knobs:")
        out.print(terminal.lint_table(found, rows))


def _plain(found: "Sequence[RowsFinding]") -> list[dict[str, Any]]:
    return [dataclasses.asdict(each.finding) | {"rows": each.rows} for each in found]


def _run(
    asked: Asked,
    *,
    concurrency: int | None = None,
    address: str | None = None,
    tracking_uri: str | None = None,
    only_failed: bool = False,
    quiet: bool = False,
) -> "Summary":
    with _told():
        from dino_lab.orchestration import runner

        if not quiet:
            # Said first: who loses the machine, or Ray's own processes, gets no last word.
            out.print("whatever stops this, the same command again goes on where each trial was")
        with contextlib.nullcontext(lambda progress: None) if quiet else terminal.following(out) as show:
            summary = runner.run(
                _sweep(asked),
                lab=asked.lab,
                concurrency=concurrency,
                address=address,
                tracking_uri=tracking_uri,
                only_failed=only_failed,
                on_progress=show,
            )
    if not quiet:
        out.print(terminal.trial_table(summary.trials))
        before = f", {summary.skipped} of them before" if summary.skipped else ""
        out.print(f"{terminal.counts(summary.trials)}{before}; {terminal.duration(summary.seconds)}")
        for note in summary.notes:
            out.print(note, markup=False)
    return summary


def _sweep(asked: Asked) -> "Sweep":
    from dino_lab.orchestration.tracking import Sweep

    sweep = Sweep(
        name=asked.name,
        baseline_name=asked.baseline_name,
        overrides=asked.overrides,
        note=asked.note,
        labelled=asked.labelled,
        study=asked.study,
    )
    if asked.start:
        return sweep
    ablation = _ablation(asked)
    return dataclasses.replace(
        sweep, baseline_row=ablation.baseline_row, published=ablation.published, paper_rows=ablation.paper_rows
    )


def _show_explained(
    said: "Explanation | Diagnosis", shown: "Sequence[Record]", *, lab: Path, name: str, unit: str, as_json: bool
) -> None:
    """In words or as facts; and the picture of the run, in the lab, but for one before its first step."""
    from analysis import explained, figures

    picture = None
    if any(record.step for record in shown):
        figure = explained.trial_curves(shown, title=f"{name}: {said.title}", onset_step=said.onset_step, unit=unit)
        picture = lab / "explained" / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(figures.render(figure, "png"))
    if as_json:
        _print_json(dataclasses.asdict(said) | {"picture": str(picture) if picture else None})
        return
    for line in terminal.explained_lines(said):
        out.print(line, markup=False, soft_wrap=True)
    if picture:
        print(picture)


def _exit_code(summary: "Summary") -> int:
    """0 for results, divergence among them; 1 if a trial failed; 130 after Ctrl-C, which alone leaves work to do."""
    if any(trial.is_open for trial in summary.trials) or summary.spent == "":
        return 130
    return int(any(trial.state == "failed" for trial in summary.trials))


def _report(asked: Asked, tracking_uri: str | None = None) -> None:
    from analysis import report

    with _told():
        folder = report.write(
            asked.lab,
            asked.name,
            baseline=asked.baseline_name,
            overrides=asked.overrides,
            # The lab also keeps what the experiment asked before its file was changed.
            asked=None if asked.start else {(each.row, each.trial.identity) for each in asked.labelled},
            tracking_uri=tracking_uri,
        )
    of_search = ("importance.md", "history.pdf", "trials.tex")
    table, *files = of_search if asked.start else ("table.md", "figure.pdf", "table.tex")
    print((folder / table).read_text())
    for name in ("report.html", *files):
        print(folder / name)
    from dino_lab.orchestration.status import status

    trials = status(asked.lab, asked.labelled)
    out.print(f"trials: {terminal.counts(trials)}")
    begun = {trial.row for trial in trials if trial.state != "waiting"}
    if missing := list(dict.fromkeys(trial.row for trial in trials if trial.row not in begun)):
        out.print(f"not in the table, since no trial of it has begun: {', '.join(missing)}", markup=False)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What a person got wrong ends the command with exit code 2 and a line for each mistake."""
    try:
        yield
    except (KeyError, IndexError):
        # Lookup errors too, but of the code and not of the person who asks.
        raise
    except (LookupError, ValueError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"dino_lab: {message}", file=sys.stderr)
    raise typer.Exit(2)


def _facts(asked: Asked) -> dict[str, Any]:
    return {"name": asked.name, "baseline": asked.baseline_name, "overrides": asked.overrides, "lab": str(asked.lab)}


def _print_json(facts: Any) -> None:
    print(json.dumps(facts, indent=2))


def _print_next(command: str, options: Sequence[str] = ()) -> None:
    out.print(f"next: {_program()} {command} {shlex.join(options)}".rstrip(), markup=False, soft_wrap=True)


def _options(changes: Sequence[str], baseline: str, seeds: str, lab: Path) -> list[str]:
    """As they were given, without defaults."""
    options = [word for change in changes for word in ("--set", change)]
    options += ["--baseline", baseline] if baseline != DEFAULT_BASELINE else []
    options += ["--seeds", seeds] if seeds else []
    return options + (["--lab", str(lab)] if lab != DEFAULT_LAB else [])


def _store_option(tracking_uri: str | None) -> list[str]:
    """As it was given, but for the password; nothing if the environment says it to the next command too."""
    if tracking_uri is None or tracking_uri == os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    return ["--tracking-uri", without_password(tracking_uri, tracking_uri)]


def _program() -> str:
    """As it was called, so that what is suggested can be copied."""
    return "dino-lab" if Path(sys.argv[0]).name == "dino-lab" else "python3 -m dino_lab"
