"""Where records lie: MLflow's tables, in sqlite or PostgreSQL, or an MLflow server; `records` asks each the same.

Tables are read by read-only SQL: a reader cannot then harm a store that a sweep is writing, and a server takes ten
times as long. MLflow's client is no way in: it needs a call for each run and metric, 12 ms each.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import pandas as pd
import requests
from sqlalchemy import BindParameter, Connection, Engine, bindparam, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from dino_lab.tracking_uri import kind_of, sqlite_path, without_password

_HISTORY = ["run_id", "key", "step", "timestamp", "value", "is_nan"]
_RUNS_IN_A_CALL = 100
"""A server refuses to give histories of more."""
_ROWS_IN_A_CALL = 25_000
"""A server gives no more rows of histories, and does not say that it cut them."""
_SECONDS = 60
"""How long a server may be silent."""


class Store(Protocol):
    """What `records` asks. Numbers are as MLflow's tables have them: nan is 0 and a flag, inf the largest double."""

    def parents(self) -> pd.DataFrame:
        """The tags of every ablation and search, the oldest first: experiment, run_id, key, value."""

    def children(self, parent: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """Tags, params and last metrics of a parent's runs: run_id, key, value; of metrics also is_nan."""

    def histories(self, metrics: pd.DataFrame) -> pd.DataFrame:
        """All values of these runs' metrics, in any order: run_id, key, step, timestamp, value, is_nan."""


@contextmanager
def opened(lab: Path, tracking_uri: str | None) -> Iterator[Store]:
    """The store that the URI names; the lab's own if it is None.

    Raises:
        ValueError: the URI names no store.
        LookupError: the store is not there, or fails within the block; names it without its password.
    """
    own = lab / "mlflow.db"
    if tracking_uri is None and not own.is_file():
        raise LookupError(f"no records in {lab}: it has no mlflow.db; run an experiment first")
    uri = tracking_uri or f"sqlite:///{own}"
    kind = kind_of(uri)
    try:
        if kind == "server":
            with requests.Session() as session:
                yield _Server(session, uri)
        else:
            engine = _sqlite(sqlite_path(uri) if tracking_uri else own) if kind == "sqlite" else _postgresql(uri)
            try:
                with engine.connect() as connection:
                    yield _Tables(connection)
            finally:
                engine.dispose()
    except (SQLAlchemyError, requests.RequestException) as error:
        why = without_password(str(error).splitlines()[0], uri)
        raise LookupError(f"no records can be read from {without_password(uri, uri)}: {why}") from None


# -------------------------------------------------- tables


def _sqlite(path: Path) -> Engine:
    address = f"{path.absolute().as_uri()}?mode=ro"
    return create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True))


def _postgresql(uri: str) -> Engine:
    return create_engine(uri, execution_options={"postgresql_readonly": True})


class _Tables:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def parents(self) -> pd.DataFrame:
        query = """
            SELECT experiments.name, runs.run_uuid, tags.key, tags.value
            FROM tags JOIN runs USING (run_uuid) JOIN experiments USING (experiment_id)
            WHERE runs.lifecycle_stage = 'active' AND runs.run_uuid IN
                (SELECT run_uuid FROM tags WHERE key = 'dino_lab.kind' AND value IN ('ablation', 'search'))
            ORDER BY runs.start_time, runs.run_uuid
        """
        return self._frame(query, ["experiment", "run_id", "key", "value"])

    def children(self, parent: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        runs = """
            SELECT run_uuid FROM tags JOIN runs USING (run_uuid)
            WHERE key = 'mlflow.parentRunId' AND value = :parent AND lifecycle_stage = 'active'
        """
        cell = ["run_id", "key", "value"]
        query = f"SELECT run_uuid, key, value FROM {{}} WHERE run_uuid IN ({runs})"
        last = f"SELECT run_uuid, key, value, is_nan FROM latest_metrics WHERE run_uuid IN ({runs})"
        return (
            self._frame(query.format("tags"), cell, parent=parent),
            self._frame(query.format("params"), cell, parent=parent),
            self._frame(last, [*cell, "is_nan"], parent=parent),
        )

    def histories(self, metrics: pd.DataFrame) -> pd.DataFrame:
        query = """
            SELECT run_uuid, key, step, timestamp, value, is_nan FROM metrics
            WHERE run_uuid IN :runs AND key IN :keys
        """
        return self._frame(query, _HISTORY, runs=[*metrics["run_id"].unique()], keys=[*metrics["key"].unique()])

    def _frame(self, query: str, columns: list[str], **values: str | list[str]) -> pd.DataFrame:
        """Lists among the values stand after IN."""
        lists: list[BindParameter[str]] = [
            bindparam(name, expanding=True) for name, value in values.items() if isinstance(value, list)
        ]
        rows = self._connection.execute(text(query).bindparams(*lists), values)
        return pd.DataFrame(map(tuple, rows), columns=columns)  # of SQLAlchemy's own rows it takes four times as long


# -------------------------------------------------- a server


class _Server:
    def __init__(self, session: requests.Session, uri: str) -> None:
        """Says who asks as MLflow's own client does: by the URI, or by MLflow's environment variables."""
        parts = urlsplit(uri)
        self._session = session
        # Without name and password, so that no error can tell them.
        self._address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
        if parts.username:
            session.auth = (unquote(parts.username), unquote(parts.password or ""))
        elif name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            session.auth = (name, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            session.headers["Authorization"] = f"Bearer {token}"

    def parents(self) -> pd.DataFrame:
        names = {each["experiment_id"]: each["name"] for each in self._search("experiments", {"view_type": "ALL"})}
        runs = [
            run
            for kind in ("ablation", "search")
            for run in self._search("runs", _of(names, f"tags.`dino_lab.kind` = '{kind}'"))
        ]
        runs.sort(key=lambda run: (int(run["info"]["start_time"]), run["info"]["run_id"]))
        experiments = {run["info"]["run_id"]: names[run["info"]["experiment_id"]] for run in runs}
        tags = _cells(runs, "tags")
        return tags.assign(experiment=tags["run_id"].map(experiments))

    def children(self, parent: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        experiment = self._get("api", "runs/get", {"run_id": parent})["run"]["info"]["experiment_id"]
        runs = [*self._search("runs", _of([experiment], f"tags.mlflow.parentRunId = '{parent}'"))]
        return _cells(runs, "tags"), _cells(runs, "params"), _as_stored(_cells(runs, "metrics"))

    def histories(self, metrics: pd.DataFrame) -> pd.DataFrame:
        frames = []
        for key, group in metrics.groupby("key"):
            left = [*group["run_id"]]
            while left:
                rows, whole = self._rows(str(key), left[:_RUNS_IN_A_CALL])
                frames.append(pd.DataFrame(rows))
                left = [run_id for run_id in left if run_id not in whole]
        return _as_stored(pd.concat(frames) if frames else pd.DataFrame(columns=_HISTORY))

    def _rows(self, key: str, run_ids: list[str]) -> tuple[list[dict[str, Any]], set[str]]:
        """Whole histories of a metric, and the runs, not always all, whose they are."""
        asked = {"run_id": run_ids, "metric_key": key, "max_results": _ROWS_IN_A_CALL}
        # The one call for several runs is the dashboard's own.
        rows = self._get("ajax-api", "metrics/get-history-bulk", asked)["metrics"]
        if len(rows) < _ROWS_IN_A_CALL:
            return rows, {*run_ids}
        # They come run by run: only the last can have been cut.
        last = rows[-1]["run_id"]
        if rows[0]["run_id"] == last:
            return [*self._long_history(key, last)], {last}
        rows = [row for row in rows if row["run_id"] != last]
        return rows, {row["run_id"] for row in rows}

    def _long_history(self, key: str, run_id: str) -> Iterator[dict[str, Any]]:
        asked: dict[str, Any] = {"run_id": run_id, "metric_key": key, "max_results": _ROWS_IN_A_CALL}
        while True:
            page = self._get("api", "metrics/get-history", asked)
            yield from ({"run_id": run_id, **row} for row in page["metrics"])
            if not page.get("next_page_token"):
                return
            asked["page_token"] = page["next_page_token"]

    def _search(self, what: str, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """All pages of what is found: experiments or runs."""
        body = {"max_results": _RUNS_IN_A_CALL, **asked}
        while True:
            page = _read(
                self._session.post(f"{self._address}/api/2.0/mlflow/{what}/search", json=body, timeout=_SECONDS)
            )
            yield from page.get(what, [])
            if not page.get("next_page_token"):
                return
            body["page_token"] = page["next_page_token"]

    def _get(self, api: str, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        address = f"{self._address}/{api}/2.0/mlflow/{path}"
        return _read(self._session.get(address, params=asked, timeout=_SECONDS))


def _read(answer: requests.Response) -> dict[str, Any]:
    answer.raise_for_status()
    return dict(answer.json())


def _of(experiment_ids: Iterable[str], condition: str) -> dict[str, Any]:
    return {"experiment_ids": [*experiment_ids], "filter": condition}


def _cells(runs: Iterable[Mapping[str, Any]], kind: str) -> pd.DataFrame:
    cells = [(run["info"]["run_id"], each["key"], each["value"]) for run in runs for each in run["data"].get(kind, [])]
    return pd.DataFrame(cells, columns=["run_id", "key", "value"])


def _as_stored(metrics: pd.DataFrame) -> pd.DataFrame:
    """As MLflow's tables have them."""
    value = metrics["value"].astype(float)  # "NaN" in some answers
    return metrics.assign(value=value.fillna(0.0), is_nan=value.isna())
