"""The dashboard: where it is, and that Ctrl-C ends all of it without a word."""

import os
import pty
import re
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from dino_lab import cli

ROOT = Path(__file__).parents[1]


def test_of_a_server_only_the_address_is_said_without_its_password(tmp_path: Path) -> None:
    uri = "https://me:secret@there:5000/mlflow/"
    result = CliRunner().invoke(cli.app, ["ui", "--lab", str(tmp_path)], env={"MLFLOW_TRACKING_URI": uri})
    assert result.exit_code == 0
    assert result.stdout == "https://there:5000/mlflow/#/experiments?workflowType=machine_learning\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'elsewhere.db'}"
    MlflowClient(uri).create_experiment("one", artifact_location="file:///nowhere")
    return uri


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "the terminal is closed"])
def test_nothing_is_said_and_nothing_left_when_it_ends(store: str, tmp_path: Path, how: str) -> None:
    code = "from dino_lab.cli import main; main()"
    command = [sys.executable, "-c", code, "ui", "--lab", str(tmp_path), "--tracking-uri", store]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command, os.environ | {"PYTHONPATH": str(ROOT)})
    said = ""
    while "Ctrl-C stops it" not in said:
        said += os.read(terminal, 4096).decode()
    (address,) = re.findall(r"(http://\S+)#", said)
    with urllib.request.urlopen(address) as page:
        assert page.status == 200
    processes = psutil.Process(pid).children(recursive=True)
    assert len(processes) >= 2
    assert not [process for process in processes if store in " ".join(process.cmdline())]
    if how == "Ctrl-C":
        os.write(terminal, b"\x03")
        assert rest(terminal) in ("^C", "^C\r\n")
    else:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def rest(terminal: int) -> str:
    """What is still said, until all who could have ended."""
    said = b""
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:
            return said.decode().removeprefix("\r\n")
