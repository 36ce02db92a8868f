import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from PIL import Image

from dino_lab.ablation import LabelledTrial
from dino_lab.core.records import Record
from dino_lab.core.trial import Trial
from dino_lab.orchestration import runner
from dino_lab.orchestration.folder import TrialFolder, locked
from dino_lab.orchestration.tracking import Mirror, Sweep, check_store

ROWS = [
    LabelledTrial(row, index, seed, {"arm": row}, Trial().but({"seed": seed, "method.operation.kind": operation}))
    for seed in (0, 1)
    for index, (row, operation) in enumerate([("both", "centering"), ("sharpening only", "none")])
]
SWEEP = Sweep("collapse", "smoke", {"batch_size": 32}, "# Why", ROWS, "both", "figure7", {"both": "row 1"})
IDS = [each.trial.identity for each in ROWS]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store: its migrations take seconds, so they are done once for all tests."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def lab(tmp_path: Path, store: Path) -> Path:
    shutil.copy(store, tmp_path / "mlflow.db")
    return tmp_path


def train_some(lab: Path, each: LabelledTrial, steps: range, verdict: str = "none") -> TrialFolder:
    folder = TrialFolder(lab, each.trial.identity)
    folder.begin(each.trial)
    for step in steps:
        onset = None if verdict == "none" else 1
        folder.append(Record(step, step / 2, 1.7e9 + step, {"train/loss": 1.5 / (step + 1)}, verdict, onset))
    return folder


def runs_of(uri_or_lab: Path | str) -> list[Run]:
    """Every run of the experiment, the parent first, then in the order of IDS, then by row."""
    uri = uri_or_lab if isinstance(uri_or_lab, str) else f"sqlite:///{uri_or_lab / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    return sorted(
        client.search_runs(experiments, run_view_type=ViewType.ALL),
        key=lambda run: (
            run.data.tags["dino_lab.kind"] != "ablation",
            IDS.index(run.data.tags["dino_lab.trial_id"]) if "dino_lab.trial_id" in run.data.tags else 0,
            run.data.tags.get("dino_lab.row", ""),
        ),
    )


def history(lab: Path, run: Run) -> list[tuple[int, float, int]]:
    client = MlflowClient(f"sqlite:///{lab / 'mlflow.db'}")
    points = client.get_metric_history(run.info.run_id, "train/loss")
    return [(point.step, point.value, point.timestamp) for point in points]


def test_a_parent_and_a_child_for_each_trial_are_there_before_any_trial_starts(lab: Path) -> None:
    mirror = Mirror(lab, SWEEP)
    mirror.catch_up()
    assert mirror.error is None
    parent, *children = runs_of(lab)
    assert parent.info.run_name == "collapse smoke batch_size=32"
    assert parent.data.tags["dino_lab.overrides"] == '{"batch_size": 32}'
    assert parent.data.tags["dino_lab.baseline"] == "smoke"
    assert parent.data.tags["dino_lab.baseline_row"] == "both"
    assert parent.data.tags["dino_lab.published"] == "figure7"
    assert json.loads(parent.data.tags["dino_lab.paper_rows"]) == {"both": "row 1"}
    assert parent.data.tags["mlflow.note.content"] == "# Why"
    assert parent.info.status == "RUNNING"
    assert [child.data.tags["dino_lab.trial_id"] for child in children] == IDS
    assert [child.info.run_name for child in children] == [
        "both s0",
        "sharpening only s0",
        "both s1",
        "sharpening only s1",
    ]
    assert {child.info.status for child in children} == {"SCHEDULED"}
    tags = children[1].data.tags
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert json.loads(tags["dino_lab.levels"]) == {"arm": "sharpening only"}
    assert (tags["dino_lab.state"], tags["dino_lab.row_index"], tags["dino_lab.seed"]) == ("waiting", "1", "0")
    assert (tags["dino_lab.verdict"], tags["dino_lab.onset_step"]) == ("none", "")


def test_params_are_every_knob_as_a_json_literal_and_strings_are_plain(lab: Path) -> None:
    Mirror(lab, SWEEP).catch_up()
    params = runs_of(lab)[2].data.params
    flat = ROWS[1].trial.flat()
    assert params.keys() == flat.keys()
    assert params["method.operation.kind"] == "none"
    assert params["precision"] == "f32"
    assert params["runtime.data_dir"] == "null"
    assert all(params[knob] in (value, json.dumps(value)) for knob, value in flat.items())


def pictures_of(lab: Path, run: Run) -> list[str]:
    """Names of the logged pictures, without those that MLflow makes of them for lists."""
    found = MlflowClient(f"sqlite:///{lab / 'mlflow.db'}").list_artifacts(run.info.run_id, "images")
    return sorted(each.path for each in found if each.path.endswith(".png"))


def test_pictures_are_logged_each_once_with_their_steps_also_by_a_later_driver(lab: Path) -> None:
    folder = train_some(lab, ROWS[0], range(2))
    (folder.path / "pictures").mkdir()

    def draw(step: int) -> None:
        Image.new("RGB", (8, 4), (step, 0, 0)).save(folder.path / "pictures" / f"attention-{step}.png")

    draw(0)
    draw(20)
    (folder.path / "pictures" / "attention-30.png.part").write_bytes(b"being written")
    Image.new("RGB", (8, 4)).save(folder.path / "pictures" / "my-note.png")
    mirror = Mirror(lab, SWEEP)
    mirror.catch_up()
    mirror.catch_up()
    assert mirror.error is None
    _, child, *_ = runs_of(lab)
    first = pictures_of(lab, child)
    assert [path.split("+")[2] for path in first] == ["0", "20"]
    assert all(path.startswith("images/attention+step+") for path in first)
    draw(100)
    Mirror(lab, SWEEP).catch_up()
    _, child, other, *_ = runs_of(lab)
    assert [path for path in pictures_of(lab, child) if path not in first] == [
        path for path in pictures_of(lab, child) if "+step+100+" in path
    ]
    assert len(pictures_of(lab, child)) == 3
    assert pictures_of(lab, other) == []


def test_pictures_that_were_sent_before_a_failure_are_not_sent_again(lab: Path) -> None:
    folder = train_some(lab, ROWS[0], range(2))
    (folder.path / "pictures").mkdir()
    for step in (0, 20):
        Image.new("RGB", (8, 4)).save(folder.path / "pictures" / f"attention-{step}.png")
    third = folder.path / "pictures" / "attention-40.png"
    third.write_bytes(b"no picture")
    mirror = Mirror(lab, SWEEP)
    mirror.catch_up()
    assert "attention-40.png" in mirror.error
    Image.new("RGB", (8, 4)).save(third)
    Mirror(lab, SWEEP).catch_up()
    _, child, *_ = runs_of(lab)
    assert [path.split("+")[2] for path in pictures_of(lab, child)] == ["0", "20", "40"]


def test_only_a_collapse_colours_a_run(lab: Path) -> None:
    train_some(lab, ROWS[0], range(2), "not_started")
    train_some(lab, ROWS[1], range(2), "few_prototypes")
    Mirror(lab, SWEEP).catch_up()
    colored = ["mlflow.runColor" in run.data.tags for run in runs_of(lab)[1:3]]
    assert colored == [False, True]


def test_data_sets_are_inputs_of_the_run_each_once(lab: Path) -> None:
    folder = train_some(lab, ROWS[0], range(2))
    of = {"classes": 8, "size": "48 x 48", "source": "drawn here"}
    data = {
        "training": {"name": "shapes", "split": "train", "images": 4000, "digest": "a" * 64, **of},
        # The same images under another name.
        "neighbours": {"name": "shapes", "split": "bank", "images": 4000, "digest": "a" * 64, **of},
        "evaluation": {"name": "shapes", "split": "test", "images": 1000, "digest": "b" * 64, **of},
    }
    folder.data.write_text(json.dumps(data))
    for _ in range(2):
        mirror = Mirror(lab, SWEEP)
        mirror.catch_up()
        assert mirror.error is None
    run = runs_of(lab)[1]
    inputs = {each.dataset.name: each for each in run.inputs.dataset_inputs}
    assert inputs.keys() == {"shapes train", "shapes test"}
    for name, digest, number, role in (("train", "a", 4000, "training"), ("test", "b", 1000, "evaluation")):
        found = inputs[f"shapes {name}"]
        assert found.dataset.digest == digest * 36
        assert json.loads(found.dataset.profile) == {"num_rows": number, "num_classes": 8}
        assert json.loads(found.dataset.source) == {"uri": "drawn here"}
        assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", role)]
    assert run.data.tags["dino_lab.data"] == "a" * 64
    assert not runs_of(lab)[2].inputs.dataset_inputs


def test_records_are_mirrored_with_their_steps_and_the_times_of_the_journal(lab: Path) -> None:
    mirror = Mirror(lab, SWEEP)
    train_some(lab, ROWS[1], range(3))
    mirror.catch_up()
    train_some(lab, ROWS[1], range(3, 5), "one_prototype")
    mirror.catch_up([IDS[1]])
    run = runs_of(lab)[2]
    assert history(lab, run) == [(step, 1.5 / (step + 1), 1_700_000_000_000 + 1000 * step) for step in range(5)]
    assert run.data.tags["dino_lab.mirrored_records"] == "5"
    assert (run.data.tags["dino_lab.verdict"], run.data.tags["dino_lab.onset_step"]) == ("one_prototype", "1")
    assert run.data.tags["mlflow.runColor"] == "#d62728"


def test_more_records_than_fit_into_one_batch_are_all_mirrored(lab: Path) -> None:
    folder = train_some(lab, ROWS[0], range(0))
    for step in range(45):
        folder.append(Record(step, 0.0, 1e9, {f"m{i}": float(step) for i in range(100)}))
    mirror = Mirror(lab, SWEEP)
    mirror.catch_up()
    assert mirror.error is None
    child = runs_of(lab)[1]
    points = MlflowClient(f"sqlite:///{lab / 'mlflow.db'}").get_metric_history(child.info.run_id, "m99")
    assert [point.step for point in points] == list(range(45))


def test_a_replay_of_what_is_there_already_adds_nothing(lab: Path) -> None:
    train_some(lab, ROWS[0], range(6))
    Mirror(lab, SWEEP).catch_up()
    child = runs_of(lab)[1]
    before = history(lab, child)
    # As if the driver had been killed between the records and the tag that counts them.
    MlflowClient(f"sqlite:///{lab / 'mlflow.db'}").set_tag(child.info.run_id, "dino_lab.mirrored_records", "2")
    for _ in range(2):
        Mirror(lab, SWEEP).catch_up()
        assert history(lab, runs_of(lab)[1]) == before
    assert runs_of(lab)[1].data.tags["dino_lab.mirrored_records"] == "6"


def test_parent_and_children_are_found_again_by_a_second_run(lab: Path) -> None:
    Mirror(lab, SWEEP).catch_up()
    before = [run.info.run_id for run in runs_of(lab)]
    again = replace(ROWS[0], trial=ROWS[0].trial.but({"runtime.cpus": 2}))
    mirror = Mirror(lab, replace(SWEEP, note="# Why not", labelled=[again, *ROWS[1:]]))
    mirror.catch_up()
    assert mirror.error is None
    assert [run.info.run_id for run in runs_of(lab)] == before
    assert runs_of(lab)[0].data.tags["mlflow.note.content"] == "# Why not"


def test_other_overrides_have_another_parent(lab: Path) -> None:
    Mirror(lab, SWEEP).catch_up()
    Mirror(lab, replace(SWEEP, overrides={})).catch_up()
    assert len(runs_of(lab)) == 2 * (1 + len(ROWS))


def test_a_trial_shared_by_two_ablations_is_mirrored_in_each(lab: Path) -> None:
    train_some(lab, ROWS[0], range(4)).write_end("finished", seconds=1.0)
    Mirror(lab, SWEEP).catch_up()
    Mirror(lab, replace(SWEEP, name="centering", labelled=ROWS[:1])).catch_up()
    shared = [run for run in runs_of(lab) if run.data.tags.get("dino_lab.trial_id") == IDS[0]]
    assert len({run.info.experiment_id for run in shared}) == 2
    assert [len(history(lab, run)) for run in shared] == [4, 4]


def test_two_rows_that_are_the_same_trial_have_a_run_each(lab: Path) -> None:
    Mirror(lab, replace(SWEEP, labelled=[ROWS[0], replace(ROWS[0], row="baseline", row_index=1)])).catch_up()
    assert [run.data.tags["dino_lab.row"] for run in runs_of(lab)[1:]] == ["baseline", "both"]


def test_end_states_become_tags_and_run_statuses(lab: Path) -> None:
    train_some(lab, ROWS[0], range(2)).write_end("finished", seconds=1.0)
    train_some(lab, ROWS[1], range(2), "uniform").write_end("diverged", "not finite", seconds=1.0)
    train_some(lab, ROWS[2], range(2))
    mirror = Mirror(lab, SWEEP)
    mirror.catch_up()
    mirror.close()
    parent, *children = runs_of(lab)
    assert [child.data.tags["dino_lab.state"] for child in children] == [
        "finished",
        "diverged",
        "interrupted",
        "waiting",
    ]
    assert [child.info.status for child in children] == ["FINISHED", "FAILED", "KILLED", "SCHEDULED"]
    assert [child.data.tags.get("dino_lab.error") for child in children] == [None, "not finite", None, None]
    assert parent.info.status == "KILLED"


def test_a_trial_that_failed_and_then_finished_keeps_no_error(lab: Path) -> None:
    train_some(lab, ROWS[0], range(2)).write_end("failed", "x" * 20_000 + "the end", seconds=1.0)
    one = replace(SWEEP, labelled=ROWS[:1])
    mirror = Mirror(lab, one)
    mirror.catch_up()
    mirror.close()
    parent, child = runs_of(lab)
    assert child.data.tags["dino_lab.error"].endswith("the end")
    assert (parent.info.status, child.info.status) == ("FAILED", "FAILED")
    train_some(lab, ROWS[0], range(2, 4)).write_end("finished", seconds=1.0)
    mirror = Mirror(lab, one)
    mirror.catch_up()
    mirror.close()
    parent, child = runs_of(lab)
    assert "dino_lab.error" not in child.data.tags
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")


def test_runs_left_running_by_a_killed_driver_are_settled_by_the_next_run_of_any_ablation(lab: Path) -> None:
    folder = train_some(lab, ROWS[0], range(2))
    with locked(folder.lock, patience_seconds=0, busy="", doing="held"):
        Mirror(lab, SWEEP).catch_up()
        assert [run.info.status for run in runs_of(lab)[:2]] == ["RUNNING", "RUNNING"]
    folder.append(Record(2, 1.0, 1e9, {"train/loss": 0.1}))
    Mirror(lab, replace(SWEEP, name="another", labelled=ROWS[3:])).catch_up()
    client = MlflowClient(f"sqlite:///{lab / 'mlflow.db'}")
    collapse = client.get_experiment_by_name("collapse").experiment_id
    runs = [run for run in runs_of(lab) if run.info.experiment_id == collapse]
    assert [run.info.status for run in runs] == ["KILLED", "KILLED", "SCHEDULED", "SCHEDULED", "SCHEDULED"]
    assert runs[1].data.tags["dino_lab.state"] == "interrupted"
    assert len(history(lab, runs[1])) == 3


@pytest.fixture
def dead_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def late_server(lab: Path, dead_port: int) -> Iterator[subprocess.Popen[bytes] | None]:
    """Starts an MLflow server on the dead port when asked to."""
    servers: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(dead_port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{lab / 'mlflow.db'}", "--artifacts-destination", str(lab)]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        servers.append(subprocess.Popen([sys.executable, *command, *store], env=environment, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{dead_port}/health")
                return
            except OSError:
                time.sleep(0.3)
        raise TimeoutError("the MLflow server did not start")

    yield start
    for server in servers:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_a_server_that_is_down_raises_nothing_and_is_caught_up_with_when_it_is_back(
    lab: Path, dead_port: int, late_server
) -> None:
    mirror = Mirror(lab, SWEEP, tracking_uri=f"http://127.0.0.1:{dead_port}")
    train_some(lab, ROWS[0], range(3))
    start = time.monotonic()
    mirror.catch_up()
    first = time.monotonic() - start
    assert "Connection refused" in mirror.error or "Max retries" in mirror.error
    assert first < 15
    mirror.catch_up()
    assert time.monotonic() - start - first < 0.1, "a server that has just failed is left alone"

    late_server()
    train_some(lab, ROWS[0], range(3, 5)).write_end("finished", seconds=1.0)
    mirror.close()
    assert mirror.error is None
    child = runs_of(lab)[1]
    assert [step for step, _, _ in history(lab, child)] == [0, 1, 2, 3, 4]
    assert child.info.status == "FINISHED"


def test_a_sync_sends_what_a_store_has_lost_and_adds_nothing_to_what_it_has(lab: Path) -> None:
    train_some(lab, ROWS[0], range(5)).write_end("finished", seconds=1.0)
    Mirror(lab, SWEEP).catch_up()
    whole = history(lab, runs_of(lab)[1])
    with closing(sqlite3.connect(lab / "mlflow.db")) as store, store:
        assert store.execute("DELETE FROM metrics WHERE step IN (1, 3)").rowcount == 2
    Mirror(lab, SWEEP).catch_up()
    assert [step for step, _, _ in history(lab, runs_of(lab)[1])] == [0, 2, 4], "MLflow is believed"
    for _ in range(2):
        assert runner.sync(SWEEP, lab=lab) is None
        assert sorted(history(lab, runs_of(lab)[1])) == whole
        assert {run.info.status for run in runs_of(lab)[:2]} == {"KILLED", "FINISHED"}


def test_records_that_a_journal_has_lost_and_makes_again_are_not_sent_twice(lab: Path) -> None:
    folder = train_some(lab, ROWS[0], range(5))
    Mirror(lab, SWEEP).catch_up()
    whole = history(lab, runs_of(lab)[1])
    folder.journal.unlink()
    later = Mirror(lab, SWEEP)
    for steps in (range(3), range(3, 7)):
        for step in steps:  # at other times, as they would be
            folder.append(Record(step, step / 2, 1.8e9 + step, {"train/loss": 1.5 / (step + 1)}))
        later.catch_up()
    assert [step for step, _, _ in history(lab, runs_of(lab)[1])] == list(range(7))
    assert history(lab, runs_of(lab)[1])[:5] == whole
    assert runner.sync(SWEEP, lab=lab) is None
    assert [step for step, _, _ in history(lab, runs_of(lab)[1])] == list(range(7))


@pytest.mark.parametrize(
    ("uri", "nodes", "said"),
    [
        (None, 2, "the lab's own store is sqlite, which must not lie on a file system that machines share"),
        ("sqlite:////nfs/mlflow.db", 3, "the cluster has 3; give an MLflow server"),
        ("mysql://me:secret@there/db", 1, r"mysql://me:\*\*\*@there/db: must begin with"),
    ],
)
def test_a_store_that_cannot_work_is_refused(uri: str | None, nodes: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_store(uri, nodes=nodes)


@pytest.mark.parametrize("uri", ["http://there:5000", "https://me:secret@there", "postgresql://me@there/db"])
def test_a_store_that_machines_can_share_is_taken(uri: str) -> None:
    check_store(uri, nodes=3)
    check_store(None, nodes=1)


def test_no_password_is_ever_shown(lab: Path, dead_port: int) -> None:
    mirror = Mirror(lab, SWEEP, tracking_uri=f"postgresql://me:se%20cret@127.0.0.1:{dead_port}/se%20cret")
    mirror.catch_up()
    assert "refused" in mirror.error
    assert "cret" not in mirror.error
