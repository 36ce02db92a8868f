"""Every experiment and every baseline, those to come included."""

import csv
import importlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from dino_lab import asking
from dino_lab.ablation import Ablation, Changes, LabelledTrial, TrialOf
from dino_lab.core import records
from dino_lab.core.records import Record
from dino_lab.core.settings import KnobError
from dino_lab.core.trainer import train
from dino_lab.core.trial import Trial
from dino_lab.space import Search
from experiments import baselines
from experiments.baselines import BASELINES

FOLDER = Path(baselines.__file__).parent
_MODULES = {path.stem: importlib.import_module(f"experiments.{path.stem}") for path in sorted(FOLDER.glob("*.py"))}
NAMES = [name for name, module in _MODULES.items() if hasattr(module, "ABLATION")]
SEARCHES = [name for name, module in _MODULES.items() if hasattr(module, "SEARCH")]
NEED_PATCHES = {
    "attention_heads": "like 'backbone.num_heads': the baseline does not set it",
    "methods": "like 'backbone.depth': the baseline does not set it",
    "patch_size": "like 'backbone.patch_size': the baseline does not set it",
}
"""What a ResNet is told that has none."""
WITHOUT_MASKS = ("cifar10_vit_tiny", *(name for name in BASELINES if name.startswith("imagenet")))
MASKS: Changes = {"evals.data.kind": "voc", "evals.data.root": "VOC2012"}
"""Where no object is marked, attention is judged by other images."""


def ablation(name: str) -> Ablation:
    found = importlib.import_module(f"experiments.{name}").ABLATION
    assert isinstance(found, Ablation)
    return found


def search(name: str) -> Search:
    found = importlib.import_module(f"experiments.{name}").SEARCH
    assert isinstance(found, Search)
    return found


def suggested(name: str, baseline: Trial, *, overrides: Changes | None = None, number: int = 8) -> list[LabelledTrial]:
    """So many trials of a search, at random over its space."""
    asked = search(name)
    start = asked.start(baseline, overrides)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [asked.labelled(study.ask(), start) for _ in range(number)]


def test_every_experiment_is_found_by_its_name_without_importing_it() -> None:
    assert set(asking.experiments()) >= set(NAMES)


def test_every_ablation_of_the_paper_and_of_data_is_there() -> None:
    assert set(NAMES) >= {
        "attention",
        "attention_heads",
        "augmentation",
        "augmentation_alone",
        "batch_size",
        "center_momentum",
        "centering_operation",
        "collapse",
        "collapse_phase",
        "color_bias",
        "components",
        "crop_count",
        "crop_scale",
        "data_sets",
        "data_size",
        "dino_to_byol_moco",
        "epochs",
        "head_activation",
        "head_batchnorm",
        "head_depth_l2",
        "local_crop_size",
        "methods",
        "momentum_teacher",
        "multicrop_by_framework",
        "output_dimension",
        "patch_size",
        "similarity",
        "student_temperature",
        "teacher_kind",
        "teacher_temperature",
    }


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("components", 9),
        ("dino_to_byol_moco", 10),
        ("centering_operation", 6),
        ("teacher_kind", 4),
        ("center_momentum", 4),
        ("teacher_temperature", 6),
        ("head_depth_l2", 7),
        ("head_batchnorm", 2),
        ("head_activation", 2),
        ("multicrop_by_framework", 8),
        ("attention_heads", 4),
        ("batch_size", 4),
        ("crop_count", 4),
        ("crop_scale", 5),
        ("epochs", 3),
        ("output_dimension", 5),
    ],
)
def test_every_arm_that_the_paper_has_a_number_for_is_a_row(name: str, numbers: int) -> None:
    with (FOLDER / "published" / "dino_paper.csv").open() as file:
        arms = {row["arm"] for row in csv.DictReader(file) if row["study"] == ablation(name).published}
    assert len(arms) == numbers
    asked = ablation(name)
    assert arms <= {asked.paper_rows.get(row.label, row.label) for row in asked.rows}
    assert asked.paper_rows.keys() <= {row.label for row in asked.rows}


@pytest.mark.parametrize("name", [*NAMES, *SEARCHES])
def test_an_experiment_says_what_it_asks_expects_and_costs(name: str) -> None:
    text = importlib.import_module(f"experiments.{name}").__doc__
    question, *_ = text.splitlines()
    assert question.endswith("?")
    assert "Expect: " in text
    assert f"Command: dino-lab run {name}" in text
    trials = search(name).trials if name in SEARCHES else len(ablation(name).rows) * len(ablation(name).seeds)
    assert f"Cost: {trials} trials on {baselines.DEFAULT}" in text


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_expands_on_every_baseline_and_survives_json(name: str, baseline: str) -> None:
    asked = ablation(name)
    if baseline == "imagenet_resnet50" and name in NEED_PATCHES:
        with pytest.raises(KnobError, match=NEED_PATCHES[name]):
            asked.trials(BASELINES[baseline])
        return
    overrides: Changes = {}
    if name == "attention" and baseline in WITHOUT_MASKS:
        with pytest.raises(KnobError, match="no objects are marked"):
            asked.trials(BASELINES[baseline])
        if baseline == "imagenet_resnet50":
            return
        overrides = MASKS
    trials = asked.trials(BASELINES[baseline], overrides=overrides)
    assert len(trials) == len(asked.rows) * len(asked.seeds)
    _survives_json(trials)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_has_trials_on_every_baseline_that_survive_json(name: str, baseline: str) -> None:
    trials = suggested(name, BASELINES[baseline])
    assert len({labelled.trial.identity for labelled in trials}) == len(trials)
    _survives_json(trials)


def _survives_json(trials: list[LabelledTrial]) -> None:
    for labelled in trials:
        again = Trial.of(json.loads(json.dumps(labelled.trial.model_dump(mode="json"))))
        assert again == labelled.trial
        assert again.identity == labelled.trial.identity


@pytest.mark.parametrize("baseline", [name for name in BASELINES if name.startswith("imagenet")])
def test_imagenet_is_cropped_from_whole_photographs_as_the_references(baseline: str) -> None:
    trial = BASELINES[baseline]
    assert trial.data.image_size is None
    assert (trial.crops.global_crops_size, trial.crops.local_crops_size) == (224, 96)
    assert trial.crops.global_1.blur_sigma == (0.1, 2.0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_names_and_trials_of_their_own(name: str) -> None:
    rows = ablation(name).rows
    assert len({row.label for row in rows}) == len(rows)
    trials = ablation(name).trials(BASELINES[baselines.DEFAULT], seeds=[0])
    assert len({labelled.trial.identity for labelled in trials}) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_study_is_in_the_papers_table(name: str) -> None:
    with (FOLDER / "published" / "dino_paper.csv").open() as file:
        studies = {row["study"] for row in csv.DictReader(file)}
    assert ablation(name).published in studies | {None}


def _rows() -> list[tuple[str, str]]:
    return [(name, row.label) for name in NAMES for row in ablation(name).rows]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize(("name", "row"), _rows())
def test_every_row_runs_two_steps(name: str, row: str, smoke: Trial, data_dir: Path, tmp_path: Path) -> None:
    quick = {"runtime.log_period_steps": 1, "runtime.data_dir": str(data_dir)}
    trials = {labelled.row: labelled.trial for labelled in ablation(name).trials(smoke, overrides=quick, seeds=[0])}
    changes = next(each.changes for each in ablation(name).rows if each.label == row)
    for needed in (str(value) for value in changes.values() if isinstance(value, TrialOf)):
        list(_trained(trials[needed], tmp_path))
    made = list(itertools.islice(_trained(trials[row], tmp_path), 3))
    assert [record.step for record in made] == [0, 1, 2]
    assert math.isfinite(made[-1].values[records.LOSS])


@pytest.mark.parametrize("name", SEARCHES)
def test_trials_of_a_search_run_two_steps(name: str, smoke: Trial, data_dir: Path, tmp_path: Path) -> None:
    quick = {"runtime.log_period_steps": 1, "runtime.data_dir": str(data_dir)}
    for labelled in suggested(name, smoke, overrides=quick, number=3):
        made = list(itertools.islice(_trained(labelled.trial, tmp_path), 3))
        assert [record.step for record in made] == [0, 1, 2]
        assert math.isfinite(made[-1].values[records.LOSS])


def _trained(trial: Trial, trials_dir: Path) -> Iterator[Record]:
    """In a folder of its own beside the others', as in a lab."""
    workdir = trials_dir / trial.identity
    workdir.mkdir()
    return train(trial, workdir=workdir)
