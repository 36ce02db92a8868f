"""MLflow's dashboard over the lab's own store, served to this machine only."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def serve(lab: Path, port: int, say: Callable[[str], None]) -> None:
    """Serves until Ctrl-C or SIGTERM; port 0 takes a free one. What a person needs to know goes to `say`.

    Raises:
        ValueError: the lab has no records, the port is taken, or the server ends by itself.
    """
    store, artifacts = lab.resolve() / "mlflow.db", lab.resolve() / "artifacts"
    if not store.exists():
        raise ValueError(f"no records in {lab}: it has no mlflow.db; run an experiment first")
    port = _free_port(port)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{store}", "--artifacts-destination", str(artifacts)]
    command += ["--uvicorn-opts", "--log-level warning"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say("starting MLflow's server")
    with contextlib.suppress(KeyboardInterrupt), _child(command) as server:
        while not _answers(port):
            if server.poll() is not None:
                raise ValueError(f"MLflow's server ended with exit code {server.returncode}")
            time.sleep(0.1)
        # Without workflowType it opens on its pages for language models and hides training runs.
        say(f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning")
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
def _child(command: Sequence[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that does not outlive the block."""
    process = subprocess.Popen(command, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
