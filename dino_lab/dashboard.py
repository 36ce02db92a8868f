"""MLflow's dashboard: served to this machine only, over the lab's own store or another database; or a server's own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from analysis import stores
from dino_lab.tracking_uri import kind_of

# Without workflowType it opens on its pages for language models and hides training runs.
_PAGE = "#/experiments?workflowType=machine_learning"


def show(lab: Path, port: int, say: Callable[[str], None], *, tracking_uri: str | None = None) -> None:
    """Says where a server has its dashboard; serves a database until Ctrl-C, SIGTERM, or the terminal is closed.

    Args:
        port: 0 takes a free one.
        say: what a person needs to know goes here.
        tracking_uri: None for the lab's own store.

    Raises:
        LookupError: the lab or the database has no records, or cannot be read.
        ValueError: the URI names no store, the port is taken, or the server ends by itself.
    """
    if tracking_uri and kind_of(tracking_uri) == "server":
        parts = urlsplit(tracking_uri)
        # A browser asks for the password itself.
        address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
        say(f"{address}/{_PAGE}")
        return
    with stores.opened(lab, tracking_uri) as store:
        store.parents()  # MLflow would make a database that is not there, and say what is wrong with one in 100 lines
    port = _free_port(port)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(lab.resolve() / "artifacts"), "--uvicorn-opts", "--log-level warning"]
    # Not on the command line, where everybody on the machine could read a password.
    environment = {"MLFLOW_BACKEND_STORE_URI": tracking_uri or f"sqlite:///{lab.resolve() / 'mlflow.db'}"}
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, signal.default_int_handler)
    say("starting MLflow's server")
    with contextlib.suppress(KeyboardInterrupt), _child(command, environment) as server:
        while not _answers(port):
            if server.poll() is not None:
                raise ValueError(f"MLflow's server ended with exit code {server.returncode}")
            time.sleep(0.1)
        say(f"http://127.0.0.1:{port}/{_PAGE}")
        say("Ctrl-C stops it")
        server.wait()


def _free_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"--port {port}: {error}") from None
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _child(command: Sequence[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that does not outlive the block, in a session of its own: Ctrl-C would make it print where it was."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"} | environment
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
