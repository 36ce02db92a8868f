import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.sweep import DRIVERS, Cluster, Server, Sweep


@pytest.fixture(autouse=True)
def _no_driver_is_left() -> Iterator[None]:
    yield
    for driver in DRIVERS:
        driver.kill()
        driver.wait()
    DRIVERS.clear()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab in which the sweep of these tests ran without any fault, on this machine alone."""
    return _undisturbed(tmp_path_factory.mktemp("undisturbed"), workers=1)


@pytest.fixture(scope="session")
def undisturbed_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, by two workers a trial: that is the same up to rounding, not bit for bit."""
    return _undisturbed(tmp_path_factory.mktemp("undisturbed"), workers=2)


def _undisturbed(folder: Path, *, workers: int) -> Path:
    sweep = Sweep(folder, workers=workers)
    assert sweep.run() == 0, sweep.said()
    return sweep.lab


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three Ray nodes on loopback."""
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """An MLflow server on loopback, with a store of its own."""
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1.3 GiB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1300m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("nobody but root may mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)
