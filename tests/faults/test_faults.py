"""What may happen to a sweep, on a real Ray cluster of three nodes and with a real MLflow server.

Whatever it is, the same command again ends with the records of a run to which nothing happened, bit for bit.
A few run by default; all of them, and more often, by `pytest -m faults`.
"""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.faults.sweep import Cluster, Server, Sweep, assert_nothing_lost, pause, wait_until

pytestmark = pytest.mark.faults


@pytest.mark.ray
def test_a_worker_and_a_node_are_killed_and_the_server_is_away(
    tmp_path: Path, undisturbed: Path, cluster: Cluster, server: Server
) -> None:
    chance = random.Random(0)
    sweep = Sweep(tmp_path, cluster=cluster, server=server)
    driver = sweep.start()
    wait_until(sweep.begun)
    pause(chance)
    for worker in sweep.workers()[:1]:
        os.kill(worker, signal.SIGKILL)
    server.kill()
    pause(chance)
    cluster.kill_a_node()
    wait_until(sweep.begun)
    server.start()
    assert driver.wait(timeout=280) == 0, sweep.said()
    assert "attempts failed or were killed, and were taken up from their checkpoints" in sweep.said()
    assert_nothing_lost(sweep, undisturbed)
