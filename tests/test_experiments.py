"""Every experiment and every baseline, those to come included."""

import csv
import importlib
import itertools
import json
import math
from pathlib import Path

import pytest

from dino_lab.ablation import Ablation, LabelledTrial
from dino_lab.core import records
from dino_lab.core.trainer import train
from dino_lab.core.trial import Trial
from experiments import baselines
from experiments.baselines import BASELINES

FOLDER = Path(baselines.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "baselines"))


def ablation(name: str) -> Ablation:
    found = importlib.import_module(f"experiments.{name}").ABLATION
    assert isinstance(found, Ablation)
    return found


def test_the_experiments_of_the_first_light_are_there() -> None:
    assert {"collapse", "teacher_temperature", "momentum_teacher", "crop_count"} <= set(NAMES)


def test_the_default_baseline_is_one_of_them() -> None:
    assert baselines.DEFAULT in BASELINES
    assert {"shapes_cpu", "smoke"} <= set(BASELINES)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_says_what_it_asks_expects_and_costs(name: str) -> None:
    text = importlib.import_module(f"experiments.{name}").__doc__
    question, *_ = text.splitlines()
    assert question.endswith("?")
    assert "Expect: " in text
    assert f"Command: dino-lab run {name}" in text
    assert f"Cost: {len(ablation(name).rows) * len(ablation(name).seeds)} trials on {baselines.DEFAULT}" in text


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_expands_on_every_baseline_and_survives_json(name: str, baseline: str) -> None:
    asked = ablation(name)
    trials = asked.trials(BASELINES[baseline])
    assert len(trials) == len(asked.rows) * len(asked.seeds)
    for labelled in trials:
        again = Trial.of(json.loads(json.dumps(labelled.trial.model_dump(mode="json"))))
        assert again == labelled.trial
        assert again.identity == labelled.trial.identity


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
    by_row: dict[str, LabelledTrial] = {t.row: t for t in ablation(name).trials(smoke, overrides=quick, seeds=[0])}
    made = list(itertools.islice(train(by_row[row].trial, workdir=tmp_path), 3))
    assert [record.step for record in made] == [0, 1, 2]
    assert math.isfinite(made[-1].values[records.LOSS])
