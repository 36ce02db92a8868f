"""The commands: parse, call, print.

Whatever takes long to import is imported by the command that needs it, so that --help and list answer at once.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from dino_lab.ablation import Ablation, LabelledTrial
    from dino_lab.core.records import Record
    from dino_lab.core.trial import Trial
    from dino_lab.orchestration.folder import TrialStatus
    from dino_lab.orchestration.runner import Progress, Summary

OFFLINE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "DO_NOT_TRACK": "true",
    "HF_HUB_OFFLINE": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Nothing is sent home or fetched, unless the person says so in the environment."""
DEFAULT_BASELINE = "shapes_cpu"
DEFAULT_LAB = Path("lab")

app = typer.Typer(
    help="A laboratory for DINO self-distillation: sweeps, collapse, and the paper's ablation tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()

Name = Annotated[str, typer.Argument(help="An experiment of `list`.", show_default=False)]
Baseline = Annotated[str, typer.Option(help="What the rows start from; see `list`.")]
Changes = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KNOB=VALUE", help="Change a knob for every row; may be repeated.", default_factory=list
    ),
]
Seeds = Annotated[str, typer.Option(help="Seeds, with commas; the experiment's own by default.", show_default=False)]
LabFolder = Annotated[Path, typer.Option("--lab", help="The folder that holds everything.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Concurrency = Annotated[int | None, typer.Option(min=1, help="Trials at a time; as many as fit by default.")]


def main() -> None:
    """The entry point of `dino-lab`."""
    for switch, value in OFFLINE.items():
        os.environ.setdefault(switch, value)
    app(prog_name=_program())


@dataclass(frozen=True)
class Asked:
    """An ablation as it was asked for: everything known by name has been found, every knob checked."""

    name: str
    note: str
    ablation: "Ablation"
    baseline_name: str
    overrides: dict[str, Any]
    labelled: "list[LabelledTrial]"
    lab: Path
    options: tuple[str, ...]
    """The options, as they are to be given to the next command."""

    def command(self, name: str, *options: str) -> str:
        return _program() + " " + shlex.join([name, self.name, *self.options, *options])


# ------------------------------------------------------------------ commands


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show what can be asked: experiments and baselines."""
    notes, names = experiments(), baselines()
    if as_json:
        _print_json({"experiments": notes, "baselines": names})
        return
    table = Table("experiment", "question", box=None, pad_edge=False)
    for name, note in notes.items():
        table.add_row(name, note.split("\n\n")[0])
    out.print(table)
    out.print(f"\nbaselines: {', '.join(names)}\nnext: {_program()} plan {next(iter(notes))}")


@app.command()
def plan(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    lab: LabFolder = DEFAULT_LAB,
    as_json: AsJson = False,
) -> None:
    """Show the trials of an experiment, and which are done; starts nothing."""
    asked = ask(name, baseline, changes, seeds, lab)
    from dino_lab.orchestration.folder import status

    states = status(lab, asked.labelled)
    ended = [trial.seconds for trial in states if trial.seconds and not trial.is_open]
    # A trial that two rows share is computed once.
    left = {trial.trial_id for trial in states if trial.is_open or trial.state == "failed"}
    estimate = sum(ended) / len(ended) * len(left) if ended else None
    if as_json:
        rows = [
            {
                "row": row.label,
                "changes": dict(row.changes),
                "trials": [_facts(t) for t in states if t.row == row.label],
            }
            for row in asked.ablation.rows
        ]
        facts = {"name": name, "baseline": baseline, "overrides": asked.overrides, "rows": rows}
        _print_json(facts | {"trials": len(states), "left": len(left), "seconds_left": estimate})
        return
    table = Table("row", "changes", *(f"seed {seed}" for seed in dict.fromkeys(t.seed for t in states)), box=None)
    for row in asked.ablation.rows:
        trials = [f"{t.trial_id} {t.state}" for t in states if t.row == row.label]
        table.add_row(row.label, "\n".join(f"{k} = {json.dumps(v)}" for k, v in row.changes.items()) or "-", *trials)
    out.print(asked.note, "\n", highlight=False)
    out.print(table)
    cost = f"about {_duration(estimate)} of trial time" if estimate is not None else "time unknown until one has ended"
    following = asked.command("run", *(["--seeds", seeds] if seeds else []))
    out.print(f"\n{len(states)} trials on {baseline}, {len(left)} to do: {cost}\nnext: {following}", highlight=False)


@app.command()
def train(changes: Changes, baseline: Baseline = DEFAULT_BASELINE, lab: LabFolder = DEFAULT_LAB) -> None:
    """Train one trial here, without Ray, and show its records; goes on where it stopped."""
    with told():
        overrides = parse_changes(changes)
        trial = find_baseline(baseline).but(overrides)
        check_lab(lab)
        check_machine([trial])
        trial = trial.but({"runtime.data_dir": str(lab.resolve() / "data")})
    import torch

    from dino_lab.orchestration.folder import TrialFolder, run_trial

    torch.set_num_threads(trial.runtime.cpus)
    folder = TrialFolder(lab, trial.identity)
    out.print(f"trial {trial.identity} in {folder.path}", highlight=False)
    try:
        with told():
            for record in run_trial(trial, lab):
                out.print(_record_line(record, trial.epochs), highlight=False)
    except KeyboardInterrupt:
        out.print("stopped; the same command again goes on from the last checkpoint")
        raise typer.Exit(130) from None
    end = folder.end()
    assert end is not None
    out.print(f"{end.state} in {_duration(end.seconds)}{f': {end.error}' if end.error else ''}", highlight=False)


@app.command()
def run(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    lab: LabFolder = DEFAULT_LAB,
    concurrency: Concurrency = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; a private one by default.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="An MLflow server; the lab's own by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment's trials; a second time goes on with what is unfinished."""
    asked = ask(name, baseline, changes, seeds, lab)
    summary = _run(asked, concurrency=concurrency, address=address, tracking_uri=tracking_uri, quiet=as_json)
    if as_json:
        facts = {"name": name, "seconds": summary.seconds, "skipped": summary.skipped, "notes": summary.notes}
        _print_json(facts | {"trials": [_facts(trial) for trial in summary.trials]})
    else:
        out.print(f"next: {asked.command('report')}\n      {_program()} ui{_lab_option(lab)}", highlight=False)
    raise typer.Exit(_exit_code(summary))


@app.command()
def status(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    seeds: Seeds = "",
    lab: LabFolder = DEFAULT_LAB,
    as_json: AsJson = False,
) -> None:
    """Show where each trial of an experiment stands."""
    asked = ask(name, baseline, changes, seeds, lab)
    from dino_lab.orchestration.folder import status

    trials = status(lab, asked.labelled)
    if as_json:
        _print_json({"name": name, "baseline": baseline, "trials": [_facts(trial) for trial in trials]})
        return
    out.print(_trial_table(trials))
    out.print(_counts(trials))


@app.command()
def report(
    name: Name,
    changes: Changes,
    baseline: Baseline = DEFAULT_BASELINE,
    lab: LabFolder = DEFAULT_LAB,
) -> None:
    """Write an experiment's tables, figures and report, from the record in MLflow."""
    _report(ask(name, baseline, changes, "", lab))


@app.command()
def ui(
    lab: LabFolder = DEFAULT_LAB,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", show_default=False)] = 0,
) -> None:
    """Serve the lab's records in MLflow's dashboard, on this machine only, until Ctrl-C."""
    store = lab.resolve() / "mlflow.db"
    if not store.exists():
        fail(f"no records in {lab}: it has no mlflow.db; run an experiment first")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            fail(f"--port {port}: {error.strerror.lower()}")
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{store}",
        "--default-artifact-root",
        str(lab.resolve() / "artifacts"),
    ]
    with contextlib.suppress(KeyboardInterrupt), _child(command) as server:
        while not _answers(port):
            if server.poll() is not None:
                fail(f"MLflow's server ended with exit code {server.returncode}")
            time.sleep(0.1)
        # Without workflowType it opens on its pages for language models and hides training runs.
        out.print(f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning", soft_wrap=True)
        out.print("Ctrl-C stops it")
        server.wait()


@app.command()
def doctor(lab: LabFolder = DEFAULT_LAB, as_json: AsJson = False) -> None:
    """Look at this machine and the lab folder, and say what is wrong."""
    from dino_lab.doctor import examine

    findings = examine(lab)
    if as_json:
        _print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        table = Table("", "", "", "what to do", box=None, pad_edge=False, show_header=False)
        colors = {"ok": "green", "warn": "yellow", "fail": "red"}
        for finding in findings:
            state = f"[{colors[finding.state]}]{finding.state}[/]"
            table.add_row(state, finding.what, finding.found, finding.advice)
        out.print(table)
    raise typer.Exit(int(any(finding.state == "fail" for finding in findings)))


@app.command()
def demo(lab: LabFolder = DEFAULT_LAB) -> None:
    """Run the paper's collapse study (Figure 7) in minutes, and draw its table and figure."""
    start = time.monotonic()
    asked = ask("collapse", DEFAULT_BASELINE, [], "", lab)
    out.print(asked.note, "\n", highlight=False)
    summary = _run(asked)
    if code := _exit_code(summary):
        raise typer.Exit(code)
    _report(asked)
    out.print(
        f"\ndone in {_duration(time.monotonic() - start)}. Look at report.html first; then:\n"
        f"  {_program()} ui{_lab_option(lab)}\n"
        f"  {_program()} plan teacher_temperature{_lab_option(lab)}",
        highlight=False,
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def test(context: typer.Context) -> None:
    """Run the test suite; arguments go to pytest."""
    root = Path(__file__).parents[1]
    if not (root / "tests").exists() or not find_spec("pytest"):
        fail("the tests are in a clone of the repository: run `python3 -m dino_lab test` there")
    passes = [context.args] if context.args else [["-m", "not ray", "-n", "2"], ["-m", "ray"]]
    codes = []
    for arguments in passes:
        codes.append(subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=root, check=False).returncode)
    raise typer.Exit(max(codes))


# ------------------------------------------------- what was asked, by name


def ask(name: str, baseline: str, changes: Sequence[str], seeds: str, lab: Path) -> Asked:
    """Finds the experiment and its trials, or ends with exit code 2 and one line on what is wrong."""
    with told():
        notes = experiments()
        if name not in notes:
            raise ValueError(unknown("experiment", name, notes))
        overrides = parse_changes(changes)
        start = find_baseline(baseline)
        chosen = parse_seeds(seeds) if seeds else None
        check_lab(lab)
        ablation = importlib.import_module(f"experiments.{name}").ABLATION
        labelled = ablation.trials(start, overrides=overrides, seeds=chosen)
    options = [] if baseline == DEFAULT_BASELINE else ["--baseline", baseline]
    for change in changes:
        options += ["--set", change]
    options += [] if lab == DEFAULT_LAB else ["--lab", str(lab)]
    return Asked(name, notes[name], ablation, baseline, overrides, labelled, lab, tuple(options))


def experiments() -> dict[str, str]:
    """Docstrings of the experiments by name, read without importing them."""
    notes = {}
    for path in sorted(_experiments_folder().glob("*.py")):
        module = ast.parse(path.read_text())
        if "ABLATION" in _assigned(module):
            notes[path.stem] = ast.get_docstring(module) or ""
    return notes


def baselines() -> list[str]:
    """Names of the baselines, read without importing them."""
    table = _assigned(ast.parse((_experiments_folder() / "baselines.py").read_text()))["BASELINES"]
    assert isinstance(table, ast.Dict)
    return [ast.literal_eval(key) for key in table.keys if key]


def find_baseline(name: str) -> "Trial":
    if name not in baselines():
        raise ValueError(unknown("baseline", name, baselines()))
    trials: dict[str, Trial] = importlib.import_module("experiments.baselines").BASELINES
    return trials[name]


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Knobs and values of `--set`; a value that is not JSON is a string."""
    overrides: dict[str, Any] = {}
    for change in changes:
        knob, equals, text = change.partition("=")
        if not knob or not equals:
            raise ValueError(f"--set {change!r}: must be knob=value, as in --set method.teacher_temp=0.06")
        try:
            overrides[knob] = json.loads(text)
        except json.JSONDecodeError:
            overrides[knob] = text
    return overrides


def parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text!r}: must be whole numbers with commas, as in --seeds 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text!r}: a seed is given twice")
    return seeds


def unknown(kind: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}known: {', '.join(sorted(known))}"


def check_lab(lab: Path) -> None:
    """The folder may be missing, but then it must be possible to make it."""
    if lab.exists() and not lab.is_dir():
        raise ValueError(f"--lab {lab}: is a file, must be a folder")
    if not lab.exists() and not lab.absolute().parent.is_dir():
        raise ValueError(f"--lab {lab}: there is no folder {lab.absolute().parent}")
    if not os.access(lab if lab.exists() else lab.absolute().parent, os.W_OK):
        raise ValueError(f"--lab {lab}: cannot be written to")


def check_machine(trials: "Sequence[Trial]") -> None:
    """What only the libraries and the machine know: the name of the network, and whether there is a GPU."""
    import torch

    for backbone in {trial.backbone for trial in trials}:
        backbone.check()
    if not torch.cuda.is_available() and any(trial.runtime.device == "cuda" for trial in trials):
        raise ValueError("runtime.device = 'cuda': torch finds no CUDA device here")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What a person got wrong ends the command with exit code 2 and a line for each mistake."""
    try:
        yield
    except ValueError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    print(f"{_program()}: {message}", file=sys.stderr)
    raise typer.Exit(2)


# ------------------------------------------------------- running, reporting


def _run(
    asked: Asked,
    *,
    concurrency: int | None = None,
    address: str | None = None,
    tracking_uri: str | None = None,
    quiet: bool = False,
) -> "Summary":
    with told():
        if address is None:
            check_machine([each.trial for each in asked.labelled])
        from dino_lab.orchestration import runner

        with _shown(quiet) as show:
            summary = runner.run(
                asked.labelled,
                name=asked.name,
                baseline_name=asked.baseline_name,
                overrides=asked.overrides,
                note=asked.note,
                baseline_row=asked.ablation.baseline_row,
                published=asked.ablation.published,
                lab=asked.lab,
                concurrency=concurrency,
                address=address,
                tracking_uri=tracking_uri,
                on_progress=show,
            )
    if not quiet:
        out.print(_trial_table(summary.trials))
        out.print(f"{_counts(summary.trials)} in {_duration(summary.seconds)}, {summary.skipped} of them before")
        for note in summary.notes:
            out.print(note, highlight=False)
    return summary


def _exit_code(summary: "Summary") -> int:
    """130 after Ctrl-C, which alone leaves trials open; 1 if any failed; 0 for results, divergence among them."""
    if any(trial.is_open for trial in summary.trials):
        return 130
    return int(any(trial.state == "failed" for trial in summary.trials))


@contextlib.contextmanager
def _shown(quiet: bool) -> Iterator["Callable[[Progress], None]"]:
    """What shows progress: a live table in a terminal, else a line for each change that matters."""
    if quiet:
        yield lambda progress: None
    elif out.is_terminal:
        with Live(console=out, transient=True, auto_refresh=False) as live:
            yield lambda progress: live.update(_live_view(progress), refresh=True)
    else:
        said: set[str] = set()

        def say_news(progress: "Progress") -> None:
            for trial in progress.trials:
                # One line for each state, and each epoch with an evaluation.
                line = f"{trial.row} s{trial.seed}: {trial.state}"
                if trial.knn is not None:
                    line += f", k-NN {trial.knn:.1f} %, collapse: {trial.verdict}"
                if line not in said and trial.state != "waiting":
                    said.add(line)
                    print(line, flush=True)

        yield say_news


def _live_view(progress: "Progress") -> Table:
    shown = [trial for trial in progress.trials if len(progress.trials) < out.height - 4 or trial.state == "running"]
    table = _trial_table(shown)
    table.caption = _counts(progress.trials)
    if progress.mirror_error:
        table.caption += f"\nMLflow is behind, nothing is lost: {progress.mirror_error.splitlines()[0]}"
    return table


def _report(asked: Asked) -> None:
    with told():
        try:
            from analysis import report

            folder = report.write(asked.lab, asked.name, baseline=asked.baseline_name, overrides=asked.overrides)
        except ModuleNotFoundError as error:
            fail(f"{error.name} is missing: pip install 'dino-lab[analysis]'")
        except LookupError as error:
            fail(str(error))
    print((folder / "table.md").read_text())
    for path in sorted(folder.iterdir()):
        print(path)


# ---------------------------------------------------------------- printing


def _trial_table(trials: "Sequence[TrialStatus]") -> Table:
    table = Table("row", "seed", "state", "epoch", "entropy/ln K", "k-NN", "collapse", "time", box=None)
    colors = {"running": "cyan", "finished": "green", "diverged": "magenta", "failed": "red", "interrupted": "yellow"}
    for trial in trials:
        onset = "" if trial.onset_step is None else f" at step {trial.onset_step}"
        table.add_row(
            trial.row,
            str(trial.seed),
            f"[{colors.get(trial.state, 'dim')}]{trial.state}[/]",
            _number(trial.epoch, ".1f", f"/{trial.epochs}"),
            _number(trial.entropy_fraction, ".2f"),
            _number(trial.knn, ".1f", " %"),
            "-" if trial.step is None else f"{trial.verdict}{onset}",
            "-" if trial.seconds is None else _duration(trial.seconds),
        )
    return table


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _counts(trials: "Sequence[TrialStatus]") -> str:
    return ", ".join(f"{number} {state}" for state, number in Counter(trial.state for trial in trials).items())


def _record_line(record: "Record", epochs: int) -> str:
    values = "  ".join(f"{name} {value:.4g}" for name, value in record.values.items())
    collapse = "" if record.verdict == "none" else f"  collapse: {record.verdict} at step {record.onset_step}"
    return f"step {record.step}  epoch {record.epoch:.2f}/{epochs}  {values}{collapse}"


def _facts(trial: "TrialStatus") -> dict[str, Any]:
    return dataclasses.asdict(trial)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _print_json(facts: Any) -> None:
    print(json.dumps(facts, indent=2))


def _program() -> str:
    """As it was called, so that what it suggests can be copied."""
    return "dino-lab" if Path(sys.argv[0]).name == "dino-lab" else "python3 -m dino_lab"


def _lab_option(lab: Path) -> str:
    return "" if lab == DEFAULT_LAB else f" --lab {shlex.quote(str(lab))}"


# ------------------------------------------------------------------- pieces


def _experiments_folder() -> Path:
    spec = find_spec("experiments")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _assigned(module: ast.Module) -> dict[str, ast.expr]:
    """What a module assigns to plain names."""
    return {
        target.id: statement.value
        for statement in module.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


@contextlib.contextmanager
def _child(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block."""
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
