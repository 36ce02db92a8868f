import socket
import time

import pytest

from dino_lab.core.trial import Trial
from dino_lab.orchestration import cluster

GIB = 2.0**30
MACHINES = [{"CPU": 8.0, "GPU": 2.0, "memory": 30 * GIB}, {"CPU": 4.0, "memory": 12 * GIB}, {"memory": 4 * GIB}]


@pytest.fixture(autouse=True)
def machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "alive_nodes", lambda: [{"Resources": each} for each in MACHINES])


def trial(**runtime: object) -> Trial:
    return Trial().but({f"runtime.{knob}": value for knob, value in runtime.items()})


@pytest.mark.parametrize(
    "runtime",
    [
        {"cpus": 8},
        {"cpus": 4, "workers": 2},  # both in the first machine, or one in each
        {"cpus": 2, "workers": 4},
        {"cpus": 3, "memory_gib": 11.5, "workers": 2},
        {"device": "cuda", "gpus": 0.5},
        {"device": "cuda", "gpus": 1.0, "workers": 2},
    ],
)
def test_a_trial_whose_workers_all_have_room_is_taken(runtime: dict[str, object]) -> None:
    cluster.check_resources([trial(**runtime)])


@pytest.mark.parametrize(
    "runtime",
    [
        {"cpus": 9},
        {"cpus": 5, "workers": 2},
        {"cpus": 1, "memory_gib": 31.0},
        {"cpus": 1, "memory_gib": 12.0, "workers": 4},
        {"device": "cuda", "gpus": 1.0, "workers": 4},
        {"device": "cuda", "gpus": 1.0, "cpus": 6, "workers": 2},
    ],
)
def test_a_trial_with_a_worker_too_many_is_refused_with_what_there_is(runtime: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"there is not as much room, only 8 CPUs, 2 GPUs, 30\.0 GiB; 4 CPUs, 0 GPUs"):
        cluster.check_resources([trial(), trial(**runtime)])


def test_an_address_where_nothing_answers_is_refused_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # without listening
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        start = time.monotonic()
        with (
            pytest.raises(ValueError, match=f"--address {address}: nothing answers there: .*refused"),
            cluster.connected(address),
        ):
            pass
    assert time.monotonic() - start < 5
