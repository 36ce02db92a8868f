"""From what a person typed to trials: names are found, knobs set and checked, and nothing is started.

Whatever is wrong is a ValueError that says what is allowed. torch is imported only once every name is right.
"""

import ast
import difflib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_lab.ablation import Ablation, LabelledTrial
    from dino_lab.core.data.source import Progress
    from dino_lab.core.data.sources import AnyData
    from dino_lab.core.trial import Trial

DEFAULT_BASELINE = "shapes_cpu"
DEFAULT_LAB = Path("lab")


@dataclass(frozen=True)
class Asked:
    """An ablation as it was asked for."""

    name: str
    note: str
    ablation: "Ablation"
    baseline_name: str
    overrides: dict[str, Any]
    labelled: "list[LabelledTrial]"
    lab: Path


def ask(name: str, *, baseline: str, changes: Sequence[str], seeds: str, lab: Path) -> Asked:
    """The experiment's trials on a baseline.

    Args:
        changes: As in `--set`.
        seeds: As in `--seeds`; empty for the experiment's own.
    """
    notes = experiments()
    if name not in notes:
        raise ValueError(_unknown("experiment", name, notes))
    check_lab(lab)
    overrides = parse_changes(changes)
    chosen = parse_seeds(seeds) if seeds else None
    start = find_baseline(baseline)
    ablation = importlib.import_module(f"experiments.{name}").ABLATION
    labelled = ablation.trials(start, overrides=overrides, seeds=chosen)
    return Asked(name, notes[name], ablation, baseline, overrides, labelled, lab)


def experiments() -> dict[str, str]:
    """Docstrings of the experiments by name, read without importing them."""
    notes = {}
    for path in sorted(_folder().glob("*.py")):
        module = ast.parse(path.read_text())
        if "ABLATION" in _assigned(module):
            notes[path.stem] = ast.get_docstring(module) or ""
    return notes


def baselines() -> list[str]:
    """Names of the baselines, read without importing them."""
    table = _assigned(ast.parse((_folder() / "baselines.py").read_text()))["BASELINES"]
    assert isinstance(table, ast.Dict)
    return [ast.literal_eval(key) for key in table.keys if key]


def find_baseline(name: str) -> "Trial":
    """The baseline itself."""
    if name not in baselines():
        raise ValueError(_unknown("baseline", name, baselines()))
    trials: dict[str, Trial] = importlib.import_module("experiments.baselines").BASELINES
    return trials[name]


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Knobs and values of `knob=value`; a value that is not JSON is a string."""
    overrides: dict[str, Any] = {}
    for change in changes:
        knob, equals, text = change.partition("=")
        if not knob or not equals:
            raise ValueError(f"--set {change!r}: must be knob=value, as in --set method.loss.teacher_temp=0.06")
        try:
            overrides[knob] = json.loads(text)
        except json.JSONDecodeError:
            overrides[knob] = text
    return overrides


def parse_seeds(text: str) -> list[int]:
    """Whole numbers with commas, each once."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text!r}: must be whole numbers with commas, as in --seeds 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text!r}: a seed is given twice")
    return seeds


def check_lab(lab: Path) -> None:
    """The folder may be missing if it can be made."""
    folder = lab if lab.exists() else lab.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--lab {lab}: {'there is no folder' if folder != lab else 'not a folder:'} {folder}")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--lab {lab}: cannot be written to")


def data_dir(lab: Path) -> Path:
    """Where a lab keeps its data sets."""
    return lab.resolve() / "data"


def with_data(asked: Asked, *, progress: "Progress", download: bool) -> Asked:
    """The same, ready to train: see `prepared`."""
    return _with_trials(
        asked, prepared([e.trial for e in asked.labelled], asked.lab, progress=progress, download=download)
    )


def prepared(trials: "Sequence[Trial]", lab: Path, *, progress: "Progress", download: bool) -> "list[Trial]":
    """Trials whose data is there and read, each data set once; of images in files with their digest, so that trials of
    other images are other trials.

    Args:
        download: Whether a data set that is not there may be fetched.
    """

    def prepare(data: "AnyData") -> "AnyData":
        return data.prepare(data_dir(lab), download=download, progress=progress)

    ready = _each_data_set(trials, prepare)
    for trial in ready:
        if trial.data.known_train_images is None:  # or the trial would not be one
            number = len(trial.data.build("train", data_dir(lab)))
            if trial.batch_size > number:
                raise ValueError(f"batch_size = {trial.batch_size}: exceeds the {number} images of data")
    return ready


def with_known_data(asked: Asked) -> tuple[Asked, list[str]]:
    """The same, with the digests of images in files that were read before, and why others have none: nothing is read
    now, and trials whose data nobody has read yet have not begun."""
    notes = []

    def identify(data: "AnyData") -> "AnyData":
        try:
            return data.with_digest(data_dir(asked.lab), progress=_not_now)
        except (ValueError, _NotRead) as error:
            notes.append(f"ids of trials are not known before their images are read: {error}")
            return data

    return _with_trials(asked, _each_data_set([each.trial for each in asked.labelled], identify)), notes


class _NotRead(Exception):
    """Images would have to be read."""


def _not_now(done: int, total: int) -> None:
    raise _NotRead(f"{total} images have not been read yet; run, train and data do it")


def _with_trials(asked: Asked, trials: "Sequence[Trial]") -> Asked:
    labelled = [replace(each, trial=trial) for each, trial in zip(asked.labelled, trials, strict=True)]
    return replace(asked, labelled=labelled)


def _each_data_set(trials: "Sequence[Trial]", change: "Callable[[AnyData], AnyData]") -> "list[Trial]":
    """The trials with what becomes of each data set, which is looked at once."""
    known: dict[AnyData, AnyData] = {}

    def changed(section: str, data: "AnyData") -> "AnyData":
        if data not in known:
            try:
                known[data] = change(data)
            except ValueError as error:
                raise ValueError(f"in evals.data: {error}" if section == "evals.data" else str(error)) from None
        return known[data]

    made = []
    for trial in trials:
        sections = {"data": trial.data} | ({} if trial.evals.data.kind == "same" else {"evals.data": trial.judged})
        changes = {section: changed(section, data) for section, data in sections.items()}
        made.append(trial.but({section: data.model_dump(mode="json") for section, data in changes.items()}))
    return made


def find_trial(trial_id: str, lab: Path) -> "Trial":
    """The settings of a trial that was run in this lab."""
    folder = lab / "trials"
    known = sorted(path.parent.name for path in folder.glob("*/trial.json"))
    if trial_id not in known:
        raise ValueError(_unknown("trial", trial_id, known) if known else f"no trials in {folder}")
    from dino_lab.core.trial import Trial

    return Trial.of(json.loads((folder / trial_id / "trial.json").read_text()))


def check_machine(trials: "Iterable[Trial]") -> None:
    """What only libraries and machine know: whether the network can be built, and whether there is a GPU."""
    import torch

    trials = list(trials)
    with torch.device("meta"):  # without its weights
        for backbone, size in {(trial.backbone, trial.crops.global_crops_size) for trial in trials}:
            backbone.build(size)
    if any(trial.runtime.device == "cuda" for trial in trials) and not torch.cuda.is_available():
        raise ValueError("runtime.device = 'cuda': torch finds no CUDA device here")


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}known: {', '.join(sorted(known))}"


def _folder() -> Path:
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
