"""`python3 -m dino_lab COMMAND`: builds .venv once from requirements.lock, then runs the command in it.

Standard library only, and runs in any Python from 3.6 as far as its one line: nothing is installed yet.
The stamp in .venv is its lock too: flock'd while setting up, and it says whether and from what .venv was built.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TextIO

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "dino_lab" / "requirements.lock"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "dino_lab.stamp"

PYTHONS = ("3.11", "3.12", "3.13")
THIS_PYTHON = "{}.{}".format(*sys.version_info)
VENV_BYTES = 8e9
"""Free space that .venv asks for: torch brings CUDA with it."""
DOWNLOAD_BYTES = 4e9
"""Free space that pip or uv asks for in the folder of temporary files."""
SETTING_UP = "setting up\n"


def main() -> None:
    """Runs the command, in .venv; ends with one line if that cannot be made."""
    in_venv = os.path.realpath(sys.prefix) == os.path.realpath(VENV)
    if not in_venv and (ROOT / "pyproject.toml").exists():
        check_python()
        if not PYTHON.exists() or not STAMP.exists() or STAMP.read_text() != stamp():
            try:
                set_up()
            except subprocess.CalledProcessError as error:
                stop(
                    f"setting up .venv failed (exit code {error.returncode}, its output is above): "
                    "check the network, the package index and the disk, then run again"
                )
            except OSError as error:
                stop(f"setting up .venv failed: {error}")
            except KeyboardInterrupt:
                stop("setting up .venv was interrupted: run again, it starts afresh")
        os.execv(PYTHON, [str(PYTHON), "-m", "dino_lab", *sys.argv[1:]])
    from dino_lab import cli

    cli.main()


def check_python() -> None:
    """Ends, naming a Python that will do, unless this one does."""
    if THIS_PYTHON not in PYTHONS:
        found = [f"python{version}" for version in PYTHONS if shutil.which(f"python{version}")]
        again = f"{(found or ['python3.12'])[-1]} -m dino_lab {' '.join(sys.argv[1:])}".strip()
        install = "" if found else " (apt install python3.12 python3.12-venv, or another)"
        stop(f"needs Python {PYTHONS[0]} to {PYTHONS[-1]}, and this is {THIS_PYTHON}: run `{again}`{install}")


def stamp() -> str:
    """What a whole .venv is built from: the digest of lock and pyproject, the Python, and the place."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return f"{digest}\n{interpreter()}\n"


def interpreter() -> str:
    """What cannot change without making .venv afresh; scripts in it name its place."""
    return f"Python {THIS_PYTHON} in {VENV}"


def set_up() -> None:
    """Makes .venv, or brings it up to date; one process does it, others wait for that one."""
    VENV.mkdir(exist_ok=True)
    with STAMP.open("a+") as file:
        take(file.fileno())
        file.seek(0)
        built_from = file.read()
        if built_from == stamp() and PYTHON.exists():
            return
        fresh = not fits(built_from)
        uv = shutil.which("uv") or ""
        if not uv:
            check_venv_module()
        if fresh:
            check_disk()
        write(file, SETTING_UP)
        install(uv, fresh, lock=file.fileno())
        write(file, stamp())
        say("ready")


def take(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process is setting up .venv; waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)


def fits(built_from: str) -> bool:
    """Whether packages can be installed into .venv as it is, however old or foreign they are."""
    if built_from == SETTING_UP or not PYTHON.exists():
        return False
    if built_from:
        return built_from.splitlines()[1] == interpreter()
    # No stamp: somebody else made it. It is taken over, never removed.
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    version = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    if version != THIS_PYTHON:
        stop(f".venv is of Python {version or '?'}, this is {THIS_PYTHON}: remove .venv, then run again")
    return True


def check_disk() -> None:
    """Ends unless .venv, and the downloads on their way into it, have room."""
    temporary = Path(tempfile.gettempdir())
    needed = {ROOT: VENV_BYTES}
    if temporary.stat().st_dev != ROOT.stat().st_dev:
        needed[temporary] = DOWNLOAD_BYTES
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if free < size:
            gigabytes = f"about {size / 1e9:.0f} GB free in {folder}, which has {free / 1e9:.1f}"
            stop(f"needs {gigabytes}: make room, then run again")


def check_venv_module() -> None:
    if not find_spec("venv") or not find_spec("ensurepip"):
        stop("this Python cannot make environments: run `apt install python3-venv` (or install uv), then run again")


def clear() -> None:
    """Removes all of .venv but the stamp, which others may be waiting for."""
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != STAMP:
            path.unlink()


def install(uv: str, fresh: bool, lock: int) -> None:
    """Makes .venv if it is to be fresh, and installs what the requirements hold, then the project."""

    def run(*command: str) -> None:
        # Our stdout is the command's alone: `python3 -m dino_lab list --json | jq` works the first time too.
        # The lock is theirs too: an installer that outlives us, killed, is waited for.
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT, pass_fds=[lock])

    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    if fresh:
        say(f"making .venv with Python {THIS_PYTHON}: once, several minutes, about 7 GB")
        clear()
        if uv:
            run(uv, "venv", *quiet, "--allow-existing", "--python", sys.executable, str(VENV))
        else:
            run(sys.executable, "-m", "venv", str(VENV))
    if uv:
        pip = [uv, "pip", "install", *quiet, "--compile-bytecode", "--python", str(PYTHON)]
    else:
        if not list(VENV.glob("bin/pip*")):  # uv made it, and is not here now
            run(str(PYTHON), "-m", "ensurepip")
        pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", *quiet]
    packages = sum("==" in line for line in REQUIREMENTS.read_text().splitlines())
    say(f"installing the packages of {REQUIREMENTS.relative_to(ROOT)} ({packages})")
    run(*pip, "--require-hashes", "-r", str(REQUIREMENTS))
    say("installing dino_lab itself")
    run(*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT))


def write(file: TextIO, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def say(line: str) -> None:
    print(f"dino_lab: {line}", file=sys.stderr, flush=True)


def stop(line: str) -> NoReturn:
    sys.exit(f"dino_lab: {line}")


if __name__ == "__main__":
    main()
