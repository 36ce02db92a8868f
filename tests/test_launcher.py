"""The launcher, in small clones whose cli.py prints how it was called; uv is a script that obeys, waits or fails."""

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CLI = """
import json, os, sys
def main():
    print(json.dumps({"arguments": sys.argv[1:], "prefix": sys.prefix}))
"""

UV = """#!{python}
import os, pathlib, subprocess, sys, time
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "venv":
    subprocess.run([sys.argv[sys.argv.index("--python") + 1], "-m", "venv", "--without-pip", sys.argv[-1]], check=True)
elif (here / "fail").exists():
    sys.exit("no route to the index")
else:
    while (here / "wait").exists():
        time.sleep(0.02)
"""

# Builds nothing: a wheel with the name alone, so that pip's editable installation needs no setuptools.
BACKEND = """
import zipfile
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "clone-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        wheel.writestr("clone-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: clone\\nVersion: 1.0\\n")
        wheel.writestr("clone-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("clone-1.0.dist-info/RECORD", "")
    return name
"""


class Clone:
    """A copy of the launcher in a project of its own, and a PATH on which there is uv or nothing."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "clone"
        self.package = self.path / "dino_lab"
        self.package.mkdir(parents=True)
        shutil.copy(ROOT / "dino_lab" / "__main__.py", self.package)
        (self.package / "__init__.py").touch()
        (self.package / "cli.py").write_text(CLI)
        (self.package / "requirements.lock").touch()
        (self.path / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        (self.path / "backend.py").write_text(BACKEND)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.venv = self.path / ".venv"
        self.environment = {"PATH": str(self.bin), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
        self.environment["PIP_FIND_LINKS"] = str(folder)

    def give_uv(self) -> None:
        uv = self.bin / "uv"
        uv.write_text(UV.format(python=sys.executable))
        uv.chmod(0o755)

    def calls(self) -> list[str]:
        """What uv was asked for, in order."""
        calls = self.bin / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def start(self, *arguments: str, python: str = sys.executable, before: str = "") -> subprocess.Popen[str]:
        """`python -m dino_lab ARGUMENTS`, in its own process group; with `before`, after those statements."""
        code = f"import runpy, sys\n{before}\nrunpy.run_module('dino_lab', run_name='__main__', alter_sys=True)"
        return subprocess.Popen(
            [python, *(["-c", code] if before else ["-m", "dino_lab"]), *arguments],
            cwd=self.path,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def launch(self, *arguments: str, python: str = sys.executable, before: str = "") -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        process = self.start(*arguments, python=python, before=before)
        printed, said = process.communicate()
        return process.returncode, printed, said

    def ran_in_venv(self, *arguments: str) -> None:
        """Asserts that the command was run in .venv; standard output is the command's alone."""
        code, printed, said = self.launch(*arguments)
        assert code == 0, said
        assert json.loads(printed) == {"arguments": list(arguments), "prefix": str(self.venv)}


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture
def clone_with_uv(clone: Clone) -> Clone:
    clone.give_uv()
    return clone


@pytest.fixture
def built(clone_with_uv: Clone) -> Clone:
    """A clone whose .venv is whole; what uv was asked for is forgotten."""
    clone_with_uv.ran_in_venv()
    (clone_with_uv.bin / "calls").unlink()
    return clone_with_uv


@pytest.fixture
def in_the_middle(clone_with_uv: Clone) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose uv has begun to install and waits."""
    (clone_with_uv.bin / "wait").touch()
    process = clone_with_uv.start()
    while len(clone_with_uv.calls()) < 2:
        time.sleep(0.02)
    yield process
    (clone_with_uv.bin / "wait").unlink(missing_ok=True)
    process.communicate()


@pytest.mark.skipif(not find_spec("ensurepip"), reason="this Python cannot make environments with pip")
def test_pip_builds_venv_from_the_hashed_lock_and_refuses_another_hash(clone: Clone, tmp_path: Path) -> None:
    digest = _wheel(tmp_path, "leaf", "1.0")
    lock = clone.package / "requirements.lock"
    lock.write_text(f"leaf==1.0 \\\n    --hash=sha256:{digest}\n")
    clone.ran_in_venv("list", "--json")
    versions = "from importlib.metadata import version; print(version('leaf'), version('clone'))"
    found = subprocess.run([clone.venv / "bin/python", "-c", versions], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1.0", "1.0"]

    _wheel(tmp_path, "leaf", "2.0")
    lock.write_text(f"leaf==2.0 \\\n    --hash=sha256:{digest}\n")
    code, printed, said = clone.launch()
    assert (code, printed) == (1, "")
    assert "DO NOT MATCH THE HASHES" in said
    assert said.splitlines()[-1].startswith("dino_lab: setting up .venv failed (exit code 1")


def test_uv_is_asked_for_hashes_and_for_the_project_without_dependencies(clone_with_uv: Clone) -> None:
    clone_with_uv.ran_in_venv("plan", "collapse", "--set", "a b=1")
    venv, packages, project = clone_with_uv.calls()
    assert venv.startswith("venv ")
    assert f"--require-hashes -r {clone_with_uv.package / 'requirements.lock'}" in packages
    assert f"--no-deps --no-build-isolation -e {clone_with_uv.path}" in project


def test_second_time_nothing_is_installed_and_nothing_said(built: Clone) -> None:
    code, _, said = built.launch("list")
    assert (code, said, built.calls()) == (0, "", [])


@pytest.mark.parametrize("file", ["dino_lab/requirements.lock", "pyproject.toml"])
def test_changed_requirements_are_installed_into_the_same_venv(built: Clone, file: str) -> None:
    (built.venv / "kept").touch()
    with (built.path / file).open("a") as text:
        text.write("# changed\n")
    built.ran_in_venv()
    assert [call.split()[0] for call in built.calls()] == ["pip", "pip"]
    assert (built.venv / "kept").exists()


def test_moved_clone_gets_a_new_venv(built: Clone) -> None:
    (built.venv / "old").touch()
    moved = built.path.with_name("moved")
    built.path.rename(moved)
    built.path, built.venv = moved, moved / ".venv"
    built.ran_in_venv()
    assert not (built.venv / "old").exists()


def test_venv_of_a_killed_setup_is_built_afresh(clone_with_uv: Clone, in_the_middle: subprocess.Popen[str]) -> None:
    os.killpg(in_the_middle.pid, signal.SIGKILL)
    in_the_middle.wait()
    (clone_with_uv.bin / "wait").unlink()
    (clone_with_uv.venv / "half").touch()
    clone_with_uv.ran_in_venv()
    assert [call.split()[0] for call in clone_with_uv.calls()] == ["venv", "pip", "venv", "pip", "pip"]
    assert not (clone_with_uv.venv / "half").exists()


def test_second_launcher_waits_for_the_first(clone_with_uv: Clone, in_the_middle: subprocess.Popen[str]) -> None:
    second = clone_with_uv.start()
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    (clone_with_uv.bin / "wait").unlink()
    assert json.loads(second.communicate()[0])["prefix"] == str(clone_with_uv.venv)
    assert json.loads(in_the_middle.communicate()[0])["prefix"] == str(clone_with_uv.venv)
    assert [call.split()[0] for call in clone_with_uv.calls()] == ["venv", "pip", "pip"]


def test_installer_that_outlives_its_launcher_is_waited_for(
    clone_with_uv: Clone, in_the_middle: subprocess.Popen[str]
) -> None:
    in_the_middle.kill()
    in_the_middle.wait()
    second = clone_with_uv.start()
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    (clone_with_uv.bin / "wait").unlink()
    assert json.loads(second.communicate()[0])["prefix"] == str(clone_with_uv.venv)


def test_interrupted_setup_says_so_in_its_last_line(in_the_middle: subprocess.Popen[str]) -> None:
    os.killpg(in_the_middle.pid, signal.SIGINT)
    _, said = in_the_middle.communicate()
    assert in_the_middle.returncode == 1
    assert said.splitlines()[-1] == "dino_lab: setting up .venv was interrupted: run again, it starts afresh"


def test_failed_installation_shows_its_output_and_one_line(clone_with_uv: Clone) -> None:
    (clone_with_uv.bin / "fail").touch()
    code, _, said = clone_with_uv.launch()
    assert code == 1
    output, line = said.splitlines()[-2:]
    assert output == "no route to the index"
    assert "check the network" in line


def test_venv_made_by_somebody_else_is_taken_over_not_removed(clone_with_uv: Clone) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone_with_uv.venv], check=True)
    (clone_with_uv.venv / "theirs").touch()
    clone_with_uv.ran_in_venv()
    assert (clone_with_uv.venv / "theirs").exists()


def test_venv_of_another_python_made_by_somebody_else_is_left_alone(clone_with_uv: Clone) -> None:
    python = clone_with_uv.venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 3.9\n")
    python.chmod(0o755)
    code, _, said = clone_with_uv.launch()
    assert code == 1
    assert said.count("\n") == 1
    assert "remove .venv" in said
    assert python.exists()


def test_python_of_the_venv_runs_the_command_and_rebuilds_nothing(clone_with_uv: Clone) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone_with_uv.venv], check=True)
    code, printed, _ = clone_with_uv.launch("list", python=str(clone_with_uv.venv / "bin" / "python"))
    assert (code, json.loads(printed)["arguments"], clone_with_uv.calls()) == (0, ["list"], [])


def test_outside_a_clone_the_command_is_run_where_it_is(clone_with_uv: Clone) -> None:
    (clone_with_uv.path / "pyproject.toml").unlink()
    code, printed, _ = clone_with_uv.launch()
    assert (code, json.loads(printed)["prefix"]) == (0, sys.prefix)
    assert not clone_with_uv.venv.exists()


@pytest.mark.parametrize(
    ("machine", "advice"),
    [
        (
            "sys.version_info = (3, 10, 4, 'final', 0)",
            "needs Python 3.11 to 3.13, and this is 3.10: run `python3.12 -m",
        ),
        (
            "import importlib.util as u; find = u.find_spec; "
            "u.find_spec = lambda name, *rest: None if name == 'ensurepip' else find(name, *rest)",
            "apt install python3-venv",
        ),
        (
            "import collections, shutil; "
            "shutil.disk_usage = lambda path: collections.namedtuple('U', 'total used free')(9, 9, 1e9)",
            "needs about 8 GB free",
        ),
    ],
    ids=["python", "venv", "disk"],
)
def test_machine_that_lacks_something_is_told_what_to_do_in_one_line(clone: Clone, machine: str, advice: str) -> None:
    code, printed, said = clone.launch("demo", before=machine)
    assert (code, printed) == (1, "")
    assert said.count("\n") == 1
    assert advice in said
    assert not (clone.venv / "bin").exists()


def _wheel(folder: Path, name: str, version: str) -> str:
    """Makes an empty wheel; returns its SHA-256."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},"
        for path, text in files.items()
    ]
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": "\n".join([*record, f"{info}/RECORD,,\n"])}.items():
            wheel.writestr(file, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()
