"""Journals -> MLflow. The journals come first; MLflow is a mirror that can catch up, and this is its only writer.

Only the driver imports this module: MLflow would cost every worker seconds and 150 MB.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

# MLflow reads these when it is imported. Unset, a call to a dead server retries for four minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a line for each run that ends
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from dino_lab.core.records import COLLAPSES, Record
from dino_lab.core.settings import Knob
from dino_lab.orchestration.folder import State, TrialFolder
from dino_lab.tracking_uri import kind_of, without_password

if TYPE_CHECKING:
    from dino_lab.ablation import LabelledTrial
    from dino_lab.orchestration.search import Study

_RUN_STATUS: dict[State, str] = {
    "waiting": "SCHEDULED",
    "running": "RUNNING",
    "interrupted": "KILLED",
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "pruned": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
}
_METRICS_IN_A_BATCH = 900
"""MLflow takes 1,000 metrics and tags together."""
_PARAMS_IN_A_BATCH = 100
_SILENT_SECONDS = 30.0
"""How long MLflow is left alone after it has failed."""
_CONNECT_SECONDS = 5
"""How long a database may take to answer."""
_ERROR_LENGTH = 5000
"""MLflow takes tags of 8,000 characters; the end of a traceback says most."""
_DIGEST_LENGTH = 36
"""MLflow takes no longer digests of data sets."""
_CONTEXT = "mlflow.data.context"
"""The tag of a data set that MLflow shows beside it: what it was used for."""
_COLLAPSED_COLOR = "#d62728"
_UNTRAINED = {
    "dino_lab.state": "waiting",
    "dino_lab.verdict": "none",
    "dino_lab.onset_step": "",
    "dino_lab.left": "[]",
    "dino_lab.mirrored_records": "0",
}


@dataclass(frozen=True)
class Sweep:
    """What is mirrored: the trials of one ablation, or of one study of a search, under one baseline."""

    name: str
    baseline_name: str
    overrides: Mapping[str, Knob]
    note: str
    labelled: "Sequence[LabelledTrial]"
    baseline_row: str = ""
    published: str | None = None
    paper_rows: Mapping[str, str] = field(default_factory=dict)
    study: "Study | None" = None
    """Of a search, which has no baseline row."""


class Mirror:
    """Keeps MLflow equal to the trials' folders. No call raises for MLflow's sake: see `error`.

    Runs are found again by their tags, and records carry the journal's times, so everything may be sent twice.
    """

    def __init__(self, lab: Path, sweep: Sweep, *, tracking_uri: str | None = None, again: bool = False) -> None:
        """Nothing is sent yet.

        Args:
            tracking_uri: None for the lab's own store.
            again: Look what MLflow really has, in place of believing what was noted when it was sent.
        """
        self.error: str | None = None
        """Why MLflow is behind the journals, None while it is not."""
        self._lab = lab
        self._sweep = sweep
        self._again = again
        self._uri = tracking_uri or f"sqlite:///{lab / 'mlflow.db'}"
        self._artifacts = None if tracking_uri else (lab / "artifacts" / sweep.name).as_uri()
        self._client: MlflowClient | None = None
        self._parent_id = ""
        self._experiment_id = ""
        self._found: dict[tuple[str, str], Run] = {}
        """Children that were there before, by row and trial."""
        self._without_child = list(sweep.labelled)
        self._children: dict[str, list[_Mirrored]] = {}
        self._silent_until = 0.0

    def catch_up(self, trial_ids: Sequence[str] | None = None) -> None:
        """Sends what is new in the folders of these trials, all by default; the first call creates the runs."""

        def act(client: MlflowClient) -> None:
            for trial_id in self._children if trial_ids is None else trial_ids:
                for child in self._children[trial_id]:
                    child.catch_up(client, self._lab)

        self._attempt(act)

    def add(self, labelled: "Sequence[LabelledTrial]") -> None:
        """Trials that were not there when the mirror was made; their runs are created by the next `catch_up`."""
        self._without_child += labelled

    def close(self) -> None:
        """Catches up for the last time and settles the parent run; nothing if nothing was ever mirrored."""
        if self._client is None and self.error is None:
            return

        def act(client: MlflowClient) -> None:
            children = [child for same_trial in self._children.values() for child in same_trial]
            for child in children:
                child.catch_up(client, self._lab)
            if self._sweep.study:
                client.log_batch(self._parent_id, tags=_run_tags(self._sweep.study.tags()))
            states = {child.state for child in children}
            status = "KILLED" if states & {"waiting", "running", "interrupted"} else "FINISHED"
            client.set_terminated(self._parent_id, "FAILED" if "failed" in states else status)

        self._silent_until = 0.0
        self._attempt(act)

    def _attempt(self, act: Callable[[MlflowClient], None]) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            if self._client is None:
                self._client = self._open()
            self._open_children(self._client)
            act(self._client)
            self.error = None
        except (MlflowException, SQLAlchemyError, OSError) as error:
            self.error = without_password(str(error).splitlines()[0], self._uri)
            self._silent_until = time.monotonic() + _SILENT_SECONDS

    def _open(self) -> MlflowClient:
        """Creates what is missing: store, experiment and parent; and finds the children of earlier drivers."""
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # `error` says it, without 100 lines
        if kind_of(self._uri) == "postgresql":
            # MLflow would try for minutes, and the sweep's loop would wait for it.
            engine = create_engine(self._uri, connect_args={"connect_timeout": _CONNECT_SECONDS})
            engine.connect().close()
            engine.dispose()
        client = MlflowClient(self._uri)
        experiment = client.get_experiment_by_name(self._sweep.name)
        self._experiment_id = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(self._sweep.name, artifact_location=self._artifacts)
        )
        self._settle_abandoned(client)
        self._parent_id = self._open_parent(client, self._experiment_id)
        self._found = {
            (run.data.tags["dino_lab.row"], run.data.tags["dino_lab.trial_id"]): run
            for run in _search(client, [self._experiment_id], f"tags.mlflow.parentRunId = '{self._parent_id}'")
        }
        return client

    def _open_children(self, client: MlflowClient) -> None:
        """A child for each row and seed that has none yet.

        Two rows may share a trial, as a level that is the baseline's does: each has its child.
        """
        while self._without_child:
            each = self._without_child[0]
            run = self._found.get((each.row, each.trial.identity))
            child = self._open_child(client, self._experiment_id, each, run)
            child.catch_up(client, self._lab, again=self._again)
            self._children.setdefault(each.trial.identity, []).append(child)
            del self._without_child[0]

    def _settle_abandoned(self, client: MlflowClient) -> None:
        """No run of any experiment is left RUNNING by a driver that was killed."""
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for run in _search(client, experiments, "attributes.status = 'RUNNING'"):
            if run.data.tags.get("dino_lab.kind") in ("ablation", "search"):
                client.set_terminated(run.info.run_id, "KILLED")
            elif run.data.tags.get("dino_lab.kind") == "trial":
                _Mirrored(run).catch_up(client, self._lab)

    def _open_parent(self, client: MlflowClient, experiment_id: str) -> str:
        sweep = self._sweep
        kind = "search" if sweep.study else "ablation"
        key = {
            "dino_lab.kind": kind,
            "dino_lab.baseline": sweep.baseline_name,
            "dino_lab.overrides": json.dumps(dict(sweep.overrides), sort_keys=True),
        }
        tags = key | {
            "dino_lab.baseline_row": sweep.baseline_row,
            "dino_lab.published": sweep.published or "",
            "dino_lab.paper_rows": json.dumps(dict(sweep.paper_rows)),
            "mlflow.note.content": sweep.note,
        }
        if sweep.study:
            key["dino_lab.study"] = sweep.study.name
            tags |= sweep.study.tags()
        for run in _search(client, [experiment_id], f"tags.`dino_lab.kind` = '{kind}'"):
            if key.items() <= run.data.tags.items():
                client.log_batch(run.info.run_id, tags=_run_tags(tags))
                client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)
        changes = [f"{knob}={value}" for knob, value in sorted(sweep.overrides.items())]
        name = " ".join([sweep.name, sweep.baseline_name, *changes])
        return str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)

    def _open_child(
        self, client: MlflowClient, experiment_id: str, each: "LabelledTrial", run: Run | None
    ) -> "_Mirrored":
        tags = {
            "dino_lab.kind": "trial",
            "mlflow.parentRunId": self._parent_id,
            "dino_lab.trial_id": each.trial.identity,
            "dino_lab.row": each.row,
            "dino_lab.row_index": str(each.row_index),
            "dino_lab.seed": str(each.seed),
            "dino_lab.levels": json.dumps(dict(each.levels)),
            **self._told(each),
        }
        if run is None:
            run = client.create_run(experiment_id, run_name=f"{each.row} s{each.seed}", tags=tags | _UNTRAINED)
        elif not tags.items() <= run.data.tags.items():
            client.log_batch(run.info.run_id, tags=_run_tags(tags))
        # Only what is missing: MLflow refuses a changed param, and `runtime` may differ from run to run.
        params = [
            Param(knob, value if isinstance(value, str) else json.dumps(value))
            for knob, value in each.trial.flat().items()
            if knob not in run.data.params
        ]
        for start in range(0, len(params), _PARAMS_IN_A_BATCH):
            client.log_batch(run.info.run_id, params=params[start : start + _PARAMS_IN_A_BATCH])
        return _Mirrored(run, told=lambda: self._told(each))

    def _told(self, each: "LabelledTrial") -> dict[str, str]:
        """What its study says of a trial now."""
        return self._sweep.study.tags_of(each) if self._sweep.study else {}


class _Mirrored:
    """One trial's run in MLflow: what it holds of the trial's folder, and what it still lacks."""

    def __init__(self, run: Run, told: Callable[[], dict[str, str]] = dict) -> None:
        self._told = told
        self._run_id = run.info.run_id
        self._trial_id = run.data.tags["dino_lab.trial_id"]
        self._status = run.info.status
        self._tags = dict(run.data.tags)
        self._read_records = 0
        """Of the journal, by this driver, up to `_read_bytes`; what another sent before is read and not sent again."""
        self._read_bytes = 0

    @property
    def state(self) -> str:
        return self._tags["dino_lab.state"]

    @property
    def _mirrored(self) -> int:
        return int(self._tags["dino_lab.mirrored_records"])

    def catch_up(self, client: MlflowClient, lab: Path, *, again: bool = False) -> None:
        """Sends the records that are new, each batch with the tags of its moment, then the run's status."""
        folder = TrialFolder(lab, self._trial_id)
        state, end = folder.stands()
        records, read_bytes = folder.records_after(self._read_bytes)
        if again:
            for batch in _batches(self._lacking(client, records)):
                self._send(client, {}, _metrics(batch))
        for batch in _batches(records[max(0, self._mirrored - self._read_records) :]):
            self._send(client, _tags_after(batch[-1], self._mirrored + len(batch)), _metrics(batch))
        self._read_records, self._read_bytes = self._read_records + len(records), read_bytes
        tags: dict[str, str] = {"dino_lab.state": state, **self._told()}
        if "dino_lab.data" not in self._tags and folder.data.exists():
            data = json.loads(folder.data.read_text())
            client.log_inputs(self._run_id, datasets=_inputs(data))
            tags["dino_lab.data"] = data["training"]["digest"]
        for name, step, path in folder.pictures(after=int(self._tags.get("dino_lab.pictured_step", -1))):
            with Image.open(path) as picture:
                client.log_image(
                    self._run_id,
                    picture,
                    key=name,
                    step=step,
                    timestamp=int(path.stat().st_mtime * 1000),
                    synchronous=True,
                )
            # At once, or a failure at a later one would send this one again.
            self._send(client, {"dino_lab.pictured_step": str(step)}, [])
        if end and end.error:
            tags["dino_lab.error"] = end.error[-_ERROR_LENGTH:]
        if self._tags["dino_lab.verdict"] in COLLAPSES:
            tags["mlflow.runColor"] = _COLLAPSED_COLOR
        self._send(client, tags, [])
        for outdated in {"dino_lab.error", "mlflow.runColor"} & self._tags.keys() - tags.keys():
            client.delete_tag(self._run_id, outdated)
            del self._tags[outdated]
        if self._status != _RUN_STATUS[state]:
            self._status = _RUN_STATUS[state]
            if state in ("waiting", "running"):
                client.update_run(self._run_id, status=self._status)
            else:
                client.set_terminated(self._run_id, self._status)

    def _lacking(self, client: MlflowClient, records: Sequence[Record]) -> list[Record]:
        """Records that MLflow is said to have and has not, each told by its first metric: it came whole or not at all.

        Not by sending all again: MLflow adds nothing where it has the same value of the same step and time, but a
        journal that lost records and made them again has other times.
        """
        steps: dict[str, set[int]] = {}
        lacking = []
        for record in records[: self._mirrored]:
            name = next(iter(record.values), None)
            if name is None:
                continue
            if name not in steps:
                steps[name] = {point.step for point in client.get_metric_history(self._run_id, name)}
            if record.step not in steps[name]:
                lacking.append(record)
        return lacking

    def _send(self, client: MlflowClient, tags: Mapping[str, str], metrics: Sequence[Metric]) -> None:
        changed = dict(tags.items() - self._tags.items())
        if changed or metrics:
            client.log_batch(self._run_id, metrics=metrics, tags=_run_tags(changed))
            self._tags.update(changed)


def check_store(tracking_uri: str | None, *, nodes: int) -> None:
    """Refuses a store that this many machines cannot share, or that cannot be opened from here.

    Raises:
        ValueError: what is allowed.
    """
    if (tracking_uri is None or kind_of(tracking_uri) == "sqlite") and nodes > 1:
        shown = tracking_uri or "the lab's own store"
        raise ValueError(
            f"--tracking-uri: {shown} is sqlite, which must not lie on a file system that "
            f"machines share, and the cluster has {nodes}; give an MLflow server (http://) or postgresql://"
        )


def _batches(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    if records:
        size = _METRICS_IN_A_BATCH // max(len(record.values) for record in records)
        for start in range(0, len(records), size):
            yield records[start : start + size]


def _metrics(records: Sequence[Record]) -> list[Metric]:
    return [
        Metric(name, value, int(record.seconds * 1000), record.step)
        for record in records
        for name, value in record.values.items()
    ]


def _inputs(data: Mapping[str, Mapping[str, str | int]]) -> list[DatasetInput]:
    """What a trial was trained on and judged by, each once, under its first role."""
    by_digest: dict[str, tuple[str, Mapping[str, str | int]]] = {}
    for role, facts in data.items():
        by_digest.setdefault(str(facts["digest"]), (role, facts))
    return [
        DatasetInput(
            Dataset(
                name=f"{facts['name']} {facts['split']}",
                digest=digest[:_DIGEST_LENGTH],
                source_type="local",
                source=json.dumps({"uri": facts["source"]}),
                profile=json.dumps({"num_rows": facts["images"], "num_classes": facts["classes"]}),
            ),
            [InputTag(_CONTEXT, role)],
        )
        for digest, (role, facts) in by_digest.items()
    ]


def _tags_after(record: Record, mirrored: int) -> dict[str, str]:
    return {
        "dino_lab.verdict": record.verdict,
        "dino_lab.onset_step": "" if record.onset_step is None else str(record.onset_step),
        "dino_lab.left": json.dumps(record.left),
        "dino_lab.mirrored_records": str(mirrored),
    }


def _run_tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in tags.items()]


def _search(client: MlflowClient, experiment_ids: list[str], filter_string: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs(experiment_ids, filter_string, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
