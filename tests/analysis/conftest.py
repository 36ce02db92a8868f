"""A made-up sweep as `orchestration.tracking` would have mirrored it: curves in closed form, no randomness.

Nine planned trials: "both" is healthy and lacks seed 2, "centring only" goes to uniform and has a diverged seed,
"sharpening only" goes to one prototype. The times are the journal's, so that a replay gives the same rows.
"""

import json
import math
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from analysis import records
from dino_lab.core.records import KNN, TRAIN_MINUTES, Record
from dino_lab.core.trial import Trial
from dino_lab.orchestration.folder import TrialFolder
from dino_lab.orchestration.search import Study
from dino_lab.space import Between, OneOf, Search
from experiments.baselines import BASELINES

K = 256
STEPS = 800
PERIOD = 20
EVERY = 200
FACTORS = {"shape": -30.0, "colour": 8.0, "texture": -38.0}
NOTE = """Do centring and sharpening keep each other from collapse?

Expect: entropy falls to 0 without centring and rises to ln K without sharpening (paper, Figure 7).

Command: dino-lab run collapse
Cost: 9 trials, `shapes_cpu`."""

# row, seed, state, verdict, onset step, step of the last record
TRIALS = (
    ("both", 0, "finished", "none", None, STEPS),
    ("centring only", 0, "finished", "uniform", 140, STEPS),
    ("sharpening only", 0, "finished", "one_prototype", 80, STEPS),
    ("both", 1, "finished", "none", None, STEPS),
    ("centring only", 1, "diverged", "none", None, 100),
    ("sharpening only", 1, "finished", "one_prototype", 100, STEPS),
    ("both", 2, "waiting", "none", None, -1),
    ("centring only", 2, "finished", "uniform", 120, STEPS),
    ("sharpening only", 2, "finished", "one_prototype", 60, STEPS),
)
ROWS = ("both", "centring only", "sharpening only")
CHANGES = {
    "both": {},
    "centring only": {"method.loss.sharpening": False},
    "sharpening only": {"method.operation.kind": "none"},
}
KNOBS = {
    "epochs": 8,
    "batch_size": 32,
    "data.kind": "shapes",
    "crops.local_crops_scale": [0.15, 0.4],
    "method.head.out_dim": K,
    "method.operation.kind": "centering",
    "method.loss.sharpening": True,
    "method.loss.teacher_temp": 0.04,
    "runtime.device": "cpu",
}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab with the sweep above, written once: MLflow takes seconds to make a store. Not to be written to."""
    lab = tmp_path_factory.mktemp("lab")
    _write_store(f"sqlite:///{lab / 'mlflow.db'}")
    return lab


@pytest.fixture(scope="session")
def write_store() -> Callable[[str], None]:
    """Writes the sweep above to an empty store."""
    return _write_store


@pytest.fixture
def lab(store: Path, tmp_path: Path) -> Path:
    """A lab of the test's own, with the same records."""
    folder = tmp_path / "lab"
    folder.mkdir()
    shutil.copy(store / "mlflow.db", folder)
    return folder


@pytest.fixture
def sweep(store: Path) -> records.Sweep:
    return records.read(store, "collapse", baseline="shapes_cpu", overrides={"epochs": 8})


@pytest.fixture
def unlabelled(lab: Path) -> records.Sweep:
    """The same sweep on data without labels: nothing is judged by k-NN."""
    return _changed(lab, "DELETE FROM {table} WHERE key LIKE '%knn_top1%'")


@pytest.fixture
def of_two_data_sets(lab: Path) -> records.Sweep:
    """The same sweep, "sharpening only" on data with the factor "digit" where the others have "shape"."""
    row = "SELECT run_uuid FROM tags WHERE key = 'dino_lab.row' AND value = 'sharpening only'"
    renamed = "UPDATE {table} SET key = replace(key, 'shape', 'digit') WHERE key LIKE 'factor/%shape' AND run_uuid IN"
    return _changed(lab, f"{renamed} ({row})")


@pytest.fixture(scope="session")
def search_store(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab with the search "find" of one objective and "weigh" of two. Not to be written to."""
    lab = tmp_path_factory.mktemp("search")
    shutil.copy(store / "mlflow.db", lab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # nobody cuts the power here
        for name, objectives in (("find", [KNN]), ("weigh", [KNN, TRAIN_MINUTES])):
            mirror(lab, searched(lab / name, name, objectives), name)
    return lab


@pytest.fixture
def search(search_store: Path) -> records.Sweep:
    return records.read(search_store, "find", baseline="smoke", overrides={})


@pytest.fixture
def weighed(search_store: Path) -> records.Sweep:
    """The same with two objectives."""
    return records.read(search_store, "weigh", baseline="smoke", overrides={})


def searched(lab: Path, name: str, objectives: list[str]) -> Study:
    """A study of made-up trials: the learning rate decides, K does not, heat collapses and high rates diverge."""
    space = {
        "optimizer.lr": Between(1e-3, 1e-1, log=True),
        ("method.loss.teacher_temp", "method.loss.warmup_teacher_temp"): Between(0.02, 0.1),
        "method.head.out_dim": OneOf([64, 256, 1024]),
        "operation": OneOf(
            {
                "centering": {"method.operation.center_momentum": Between(0.5, 0.99)},
                "none": {"method.operation.kind": "none"},
            }
        ),
        "optimizer.warmup_epochs": Between(0.0, 3.2),
    }
    options = {"pruner": "median"} if len(objectives) == 1 else {}
    asked = Search(space, objectives, trials=48, sampler="random", fixed={"batch_size": 4}, **options)
    baseline = BASELINES["smoke"]
    seed = baseline.but({**asked.fixed, "optimizer.lr": 0.02, "method.head.out_dim": 256})
    _end(lab, seed, "finished", [40.0, 62.0, 77.0])
    study = Study(lab, asked, name=name, baseline_name="smoke", baseline=baseline)
    study.begin()
    while each := study.ask():
        if each.row_index >= 47:
            continue  # runs still
        trial = each.trial
        rate, temp = math.log10(trial.optimizer.lr / 0.01), trial.method.loss.teacher_temp
        good = 84 - 45 * abs(rate) - 100 * abs(temp - 0.04) + math.log2(trial.method.head.out_dim / 64)
        if trial.optimizer.lr > 0.08:
            _end(lab, trial, "diverged", [35.0])
        elif temp > 0.085:
            _end(lab, trial, "stopped", [30.0, 22.0])
        elif each.row_index == 22:
            _end(lab, trial, "failed", [], error="MemoryError: no memory")
        elif study.report(trial.identity, Record(4, 1.0, 1e9, {KNN: good / 2})):
            _end(lab, trial, "pruned", [good / 2])
        else:
            _end(lab, trial, "finished", [good / 2, good * 0.8, good])
        study.tell(trial.identity)
    return study


def _end(lab: Path, trial: Trial, state: str, course: list[float], error: str | None = None) -> None:
    """A trial's folder as a worker leaves it, a record of each epoch; minutes grow with K."""
    folder = TrialFolder(lab, trial.identity)
    folder.begin(trial)
    verdict = ("uniform", 3, ()) if state == "stopped" else ("none", None, ())
    for epoch, knn in enumerate([36.0, *course]):
        values = {KNN: knn} if epoch == 0 else {KNN: knn, TRAIN_MINUTES: epoch * trial.method.head.out_dim / 1000}
        folder.append(Record(4 * epoch, float(epoch), 1e9 + epoch, values, *verdict))
    folder.write_end(state, error, seconds=1.0)


def mirror(lab: Path, study: Study, name: str) -> None:
    """What `orchestration.tracking` sends of a study. Its trials are numbered, since ids change with every new knob."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(f"sqlite:///{lab / 'mlflow.db'}")
    experiment = client.create_experiment(name, artifact_location=(lab / "artifacts").as_uri())
    tags = {
        "dino_lab.kind": "search",
        "dino_lab.baseline": "smoke",
        "dino_lab.overrides": "{}",
        "dino_lab.baseline_row": "",
        "dino_lab.published": "",
        "dino_lab.paper_rows": "{}",
        "mlflow.note.content": "Which rate?\n\nExpect: 0.01.\n\nCommand: dino-lab run find\nCost: 48 trials on smoke.",
    }
    # Once the space was another one, and so was the study.
    client.create_run(experiment, tags=tags | study.tags() | {"dino_lab.study": "before"}, start_time=1)
    parent = client.create_run(experiment, tags=tags | study.tags()).info.run_id
    for each in study.labelled():
        folder = TrialFolder(lab / name, each.trial.identity)
        kept = folder.records()
        last = kept[-1] if kept else None
        run_id = client.create_run(
            experiment,
            tags={
                "dino_lab.kind": "trial",
                "mlflow.parentRunId": parent,
                "dino_lab.trial_id": f"{each.row_index:010}",
                "dino_lab.row": each.row,
                "dino_lab.row_index": str(each.row_index),
                "dino_lab.seed": str(each.seed),
                "dino_lab.levels": "{}",
                "dino_lab.state": folder.state(),
                "dino_lab.verdict": last.verdict if last else "none",
                "dino_lab.onset_step": str(last.onset_step) if last and last.onset_step is not None else "",
                "dino_lab.left": "[]",
                **study.tags_of(each),
            },
        ).info.run_id
        params = [Param(k, v if isinstance(v, str) else json.dumps(v)) for k, v in each.trial.flat().items()]
        metrics = [Metric(k, v, int(r.seconds * 1000), r.step) for r in kept for k, v in r.values.items()]
        for start in range(0, len(params), 100):
            client.log_batch(run_id, params=params[start : start + 100])
        client.log_batch(run_id, metrics=metrics)


def _changed(lab: Path, statement: str) -> records.Sweep:
    with sqlite3.connect(lab / "mlflow.db") as store:
        for table in ("metrics", "latest_metrics"):
            store.execute(statement.format(table=table))
    store.close()
    return records.read(lab, "collapse", baseline="shapes_cpu", overrides={"epochs": 8})


@pytest.fixture
def recorded() -> Callable[[str, int, int], dict[str, float]]:
    """What a trial of a row and seed recorded at a step."""
    return lambda row, seed, step: dict(values(row, seed, step))


def _write_store(uri: str) -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(uri)
    experiment = client.create_experiment("collapse", artifact_location="file:///nowhere")

    def parent(baseline: str, overrides: dict[str, int]) -> str:
        tags = {
            "dino_lab.kind": "ablation",
            "dino_lab.baseline": baseline,
            "dino_lab.overrides": json.dumps(overrides),
            "dino_lab.baseline_row": "both",
            "dino_lab.published": "",
            "dino_lab.paper_rows": "{}",
            "mlflow.note.content": NOTE,
        }
        return str(client.create_run(experiment, run_name=f"collapse {baseline}", tags=tags).info.run_id)

    def child(parent_id: str, row: str, seed: int, state: str, verdict: str, onset: int | None) -> str:
        tags = {
            "dino_lab.kind": "trial",
            "mlflow.parentRunId": parent_id,
            "dino_lab.trial_id": f"{ROWS.index(row)}{seed}abcdef01",
            "dino_lab.row": row,
            "dino_lab.row_index": str(ROWS.index(row)),
            "dino_lab.seed": str(seed),
            "dino_lab.levels": json.dumps({"operations": row}),
            "dino_lab.state": state,
            "dino_lab.verdict": verdict,
            "dino_lab.onset_step": "" if onset is None else str(onset),
        }
        run_id = str(client.create_run(experiment, run_name=f"{row} s{seed}", tags=tags).info.run_id)
        knobs = KNOBS | CHANGES[row] | {"seed": seed}
        params = [Param(k, v if isinstance(v, str) else json.dumps(v)) for k, v in knobs.items()]
        client.log_batch(run_id, params=params)
        return run_id

    runs = {}
    main = parent("shapes_cpu", {"epochs": 8})
    for row, seed, state, verdict, onset, last in TRIALS:
        run_id = runs[row, seed] = child(main, row, seed, state, verdict, onset)
        metrics = [
            Metric(name, value, 1_000_000 + step, step)
            for step in range(0, last + 1, PERIOD)
            for name, value in values(row, seed, step)
        ]
        for start in range(0, len(metrics), 900):
            client.log_batch(run_id, metrics=metrics[start : start + 900])
    # A step that comes a second time, with an earlier and so an outdated timestamp.
    client.log_batch(runs["both", 0], metrics=[Metric("train/kl", 9.0, 1, 400)])
    # Numbers that MLflow does not store as they are.
    diverged = runs["centring only", 1]
    odd = [Metric("train/gradient_norm", math.inf, 2_000_000, 100), Metric("center/norm", math.nan, 2_000_000, 100)]
    client.log_batch(diverged, metrics=odd)
    # A run that somebody deleted, and a sweep of which nothing has started.
    client.delete_run(child(main, "both", 7, "finished", "none", None))
    child(parent("smoke", {}), "both", 0, "waiting", "none", None)


def values(row: str, seed: int, step: int) -> Iterator[tuple[str, float]]:
    """What a trial of this row and seed records at a step."""
    progress = step / STEPS
    wobble = 0.02 * math.sin(0.11 * step + 2 * seed + ROWS.index(row))
    if step:
        start = 0.93 + 0.01 * seed
        speed = 14 - 2 * seed
        fraction, kl = {
            "both": (0.62 + (start - 0.62) * math.exp(-4 * progress) + wobble, 0.45 + 0.5 * math.exp(-3 * progress)),
            "centring only": (1 - (1 - start) * math.exp(-speed * progress), 0.35 * math.exp(-speed * progress)),
            "sharpening only": (start * math.exp(-speed * progress), 0.9 * math.exp(-speed * progress)),
        }[row]
        yield "train/teacher_entropy", fraction * math.log(K)
        yield "train/teacher_entropy_fraction", fraction
        yield "train/kl", kl * (1 + wobble)
        yield "train/loss", fraction * math.log(K) + kl * (1 + wobble)
        yield "runtime/images_per_second", 410.0 + seed
        yield "runtime/train_minutes", (1.2 + 0.05 * seed + 0.4 * ROWS.index(row)) * progress
        yield "runtime/peak_memory_mib", 900.0 + 64 * ROWS.index(row) + 5 * seed + 100 * progress
    if step % EVERY == 0:
        untrained = 36.0 + seed
        gain = {"both": 45.0, "centring only": -2.0, "sharpening only": -9.0}[row] * (1 - math.exp(-3 * progress))
        yield "eval/knn_top1", untrained + gain + 10 * wobble * (step > 0)
        yield "eval/student_knn_top1", untrained + gain
        for factor, easier in FACTORS.items():
            gains = gain * (0.4 if easier < 0 else 1)
            base = 18.0 if easier < 0 else untrained
            yield f"factor/knn_top1_{factor}", max(base + gains + 10 * wobble * (step > 0), 0)
        if step == 0:
            yield "eval/pixels_knn_top1", 61.5
            for factor, easier in FACTORS.items():
                yield f"factor/pixels_knn_top1_{factor}", 61.5 + easier
