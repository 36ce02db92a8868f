"""Kinds of stores: the same records give the same frames from each, and what cannot be read is said in one line."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis import records, report

POSTGRESQL = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"))
RUNS, ROWS, LONG = 120, 300, 25_010
"""More runs than a server takes in a call; more rows of them, and of one alone, than it gives."""


def read(
    lab: Path, tracking_uri: str | None = None, *, baseline: str = "shapes_cpu", **overrides: int
) -> records.Sweep:
    return records.read(lab, "collapse", baseline=baseline, overrides=overrides, tracking_uri=tracking_uri)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def long_lab(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up sweep, and under its other baseline one that is larger than a server's limits."""
    lab = tmp_path_factory.mktemp("long")
    shutil.copy(store / "mlflow.db", lab)
    with closing(sqlite3.connect(lab / "mlflow.db")) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        others = ", ".join(row[1] for row in db.execute("PRAGMA table_info(runs)") if row[1] != "run_uuid")
        (model,) = db.execute(
            "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = "
            "(SELECT run_uuid FROM tags WHERE key = 'dino_lab.baseline' AND value = 'smoke')"
        ).fetchone()
        for i in range(RUNS):
            run = f"{i:032x}"
            db.execute(
                f"INSERT INTO runs (run_uuid, {others}) SELECT ?, {others} FROM runs WHERE run_uuid = ?", [run, model]
            )
            for table in ("tags", "params"):
                db.execute(
                    f"INSERT INTO {table} (key, value, run_uuid) SELECT key, value, ? FROM {table} WHERE run_uuid = ?",
                    [run, model],
                )
            for key, value in {"trial_id": f"{i:010x}", "row": f"row {i}", "row_index": str(i + 1)}.items():
                db.execute("UPDATE tags SET value = ? WHERE key = ? AND run_uuid = ?", [value, f"dino_lab.{key}", run])
            rows = LONG if i == 7 else ROWS
            points = [("train/kl", step / 7 + i, 1000 + step, step, False, run) for step in range(rows)]
            db.executemany(
                "INSERT INTO metrics (key, value, timestamp, step, is_nan, run_uuid) VALUES (?, ?, ?, ?, ?, ?)", points
            )
            db.execute(
                "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) VALUES (?, ?, ?, ?, ?, ?)",
                points[-1],
            )
    return lab


@pytest.fixture(scope="module")
def server(long_lab: Path) -> Iterator[str]:
    """A real MLflow server over the lab's sqlite file."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{long_lab / 'mlflow.db'}"]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def answers() -> bool:
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200)
        except OSError:
            return False

    process = subprocess.Popen(
        command, cwd=long_lab, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """A real PostgreSQL with a password, and an empty database."""
    pytest.importorskip("psycopg")
    if not (POSTGRESQL / "initdb").exists():
        pytest.skip("no PostgreSQL")
    # It refuses to be run by root. pytest's folders are closed to others.
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="dino_lab_postgresql_"))
    port = free_port()
    try:
        (folder / "password").write_text("se/cret")
        if as_user:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        options = ["-D", str(folder / "data"), "-U", "me", "-A", "scram-sha-256", "--pwfile", str(folder / "password")]
        # A locale in which names have another order than in sqlite.
        options += ["--no-sync", "--locale=C", "--encoding=UTF8", "--locale-provider=icu", "--icu-locale=en"]
        initdb = [*as_user, POSTGRESQL / "initdb", *options]
        subprocess.run(initdb, cwd=folder, check=True, capture_output=True)
        options = [
            "-p",
            str(port),
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "unix_socket_directories=",
            "-c",
            "fsync=off",
        ]
        postgres = [*as_user, POSTGRESQL / "postgres", "-D", folder / "data", *options]
        with subprocess.Popen(postgres, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:

            def answers() -> bool:
                ready = subprocess.run(
                    [POSTGRESQL / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)], check=False
                )
                return ready.returncode == 0

            try:
                wait_until(answers)
                yield f"postgresql://me:se%2Fcret@127.0.0.1:{port}/postgres"
            finally:
                process.send_signal(signal.SIGINT)  # without waiting for clients
    finally:
        shutil.rmtree(folder)


def assert_equal(one: records.Sweep, other: records.Sweep) -> None:
    pd.testing.assert_frame_equal(one.trials, other.trials, check_exact=True)
    pd.testing.assert_frame_equal(one.curves, other.curves, check_exact=True)
    assert replace(one, trials=None, curves=None) == replace(other, trials=None, curves=None)


def without_run_ids(sweep: records.Sweep) -> records.Sweep:
    """MLflow draws them when a run is created."""
    return replace(sweep, trials=sweep.trials.drop(columns="run_id"))


def test_the_lab_s_own_file_is_a_store_like_any_other(store: Path, tmp_path: Path) -> None:
    assert_equal(read(store, epochs=8), read(tmp_path, f"sqlite:///{store / 'mlflow.db'}", epochs=8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_gives_the_same_frames_as_its_file(long_lab: Path, server: str, tmp_path: Path) -> None:
    assert_equal(read(long_lab, epochs=8), read(tmp_path, server, epochs=8))
    with pytest.raises(LookupError, match=f"no records of 'colapse' in {server}; with records: collapse"):
        records.read(tmp_path, "colapse", baseline="smoke", overrides={}, tracking_uri=server)


@pytest.mark.slow
def test_nothing_is_cut_where_a_server_gives_no_more(long_lab: Path, server: str, tmp_path: Path) -> None:
    there = read(tmp_path, server, baseline="smoke")
    assert len(there.trials) == RUNS + 1
    counts = there.curves.groupby("trial_id").size()
    assert counts.pop(f"{7:010x}") == LONG
    assert counts.to_list() == [ROWS] * (RUNS - 1)
    assert_equal(read(long_lab, baseline="smoke"), there)


@pytest.mark.slow
def test_postgresql_gives_the_same_frames_and_files_as_sqlite(
    store: Path, postgresql: str, write_store: Callable[[str], None], tmp_path: Path
) -> None:
    write_store(postgresql)
    there = read(tmp_path, postgresql, epochs=8)
    assert_equal(without_run_ids(read(store, epochs=8)), without_run_ids(there))
    options = {"baseline": "shapes_cpu", "overrides": {"epochs": 8}, "tracking_uri": postgresql}
    folder = report.write(tmp_path, "collapse", **options)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if b"cret@" in path.read_bytes() or b"postgresql" in path.read_bytes()] == []
    assert (folder / "table.csv").read_bytes() == report.contents(read(store, epochs=8))["table.csv"]


@pytest.mark.slow
def test_a_database_or_a_password_that_is_wrong_is_said_in_one_line(postgresql: str, tmp_path: Path) -> None:
    for uri, said in (
        (postgresql.removesuffix("postgres") + "template1", 'relation "tags" does not exist'),
        (postgresql.replace("se%2Fcret", "sesame"), "password authentication failed"),
    ):
        assert said in failure(tmp_path, uri)


def failure(lab: Path, uri: str) -> str:
    """What is said of a store that cannot be read."""
    with pytest.raises(LookupError) as error:
        read(lab, uri)
    (line,) = str(error.value).splitlines()
    assert line.startswith("no records can be read from ")
    assert "cret" not in line
    assert "sesame" not in line
    return line


@pytest.mark.parametrize(
    "uri", ["postgresql://me:se%20cret@127.0.0.1:{port}/db", "http://me:se%20cret@127.0.0.1:{port}"]
)
def test_a_store_that_is_away_is_named_without_its_password(tmp_path: Path, uri: str) -> None:
    line = failure(tmp_path, uri.format(port=free_port()))
    assert "me:***@127.0.0.1" in line
    assert "refused" in line


def test_a_sqlite_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert "unable to open database file" in failure(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_mlflow_s_tables_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    assert "no such table" in failure(tmp_path, f"sqlite:///{tmp_path / 'empty.db'}")
