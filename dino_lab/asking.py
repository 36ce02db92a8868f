"""From what a person typed to trials: names are found, knobs set and checked, and nothing is started.

Whatever is wrong is a ValueError that says what is allowed. torch is imported only once every name is right.
"""

import ast
import difflib
import importlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_lab.ablation import Ablation, LabelledTrial
    from dino_lab.core.trial import Trial
    from dino_lab.orchestration.search import Study
    from dino_lab.space import Search

DEFAULT_BASELINE = "shapes_cpu"
DEFAULT_LAB = Path("lab")


@dataclass(frozen=True)
class Asked:
    """An experiment as it was asked for: an ablation with its trials, or a search, whose trials its study asks for."""

    name: str
    note: str
    experiment: "Ablation | Search"
    baseline_name: str
    overrides: dict[str, Any]
    labelled: "list[LabelledTrial]"
    lab: Path
    start: "Trial | None" = None
    """What every trial of a search is made of; None for an ablation."""
    study: "Study | None" = None
    """A search's, once it is opened."""


def ask(name: str, *, baseline: str, changes: Sequence[str], seeds: str, lab: Path, reading: bool = False) -> Asked:
    """The experiment's trials on a baseline.

    Args:
        changes: As in `--set`.
        seeds: As in `--seeds`; empty for the experiment's own.
        reading: Nothing will be written into the lab.
    """
    notes = experiments()
    if name not in notes:
        raise ValueError(_unknown("experiment", name, notes))
    if not reading:
        check_lab(lab)
    overrides = parse_changes(changes)
    chosen = parse_seeds(seeds) if seeds else None
    start = find_baseline(baseline)
    module = importlib.import_module(f"experiments.{name}")
    if hasattr(module, "SEARCH"):
        if chosen:
            raise ValueError(f"--seeds {seeds!r}: {name} is a search, which has one seed, its own")
        common = module.SEARCH.start(start, overrides)
        return Asked(name, notes[name], module.SEARCH, baseline, overrides, [], lab, start=common)
    labelled = module.ABLATION.trials(start, overrides=overrides, seeds=chosen)
    return Asked(name, notes[name], module.ABLATION, baseline, overrides, labelled, lab)


def experiments() -> dict[str, str]:
    """Docstrings of the experiments by name, read without importing them."""
    notes = {}
    for path in sorted(_folder().glob("*.py")):
        module = ast.parse(path.read_text())
        if {"ABLATION", "SEARCH"} & _assigned(module).keys():
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


def find_trial(trial_id: str, lab: Path) -> "Trial":
    """The settings of a trial that was run in this lab."""
    folder = lab / "trials"
    known = sorted(path.parent.name for path in folder.glob("*/trial.json"))
    if trial_id not in known:
        raise ValueError(_unknown("trial", trial_id, known) if known else f"no trials in {folder}")
    from dino_lab.core.trial import Trial

    settings = folder / trial_id / "trial.json"
    try:
        return Trial.of(json.loads(settings.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{settings}: is damaged ({error}); running the trial again writes it anew") from None


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
