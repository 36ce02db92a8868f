"""Ray itself: a private one of this machine or a running cluster, and what its machines have room for."""

import logging
import os
import re
import signal
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dino_lab.core.trial import Trial

_OBJECT_STORE_BYTES = 100 * 2**20
"""Trials share nothing through Ray; its default is a third of the memory."""
_ANSWER_SECONDS = 10.0


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray for the block. A private one listens on loopback, and dies with this process.

    SIGTERM does what Ctrl-C does meanwhile: Ray's own handler would abort.

    Raises:
        ValueError: there is no cluster at this address, or it wants another token than this process has.
    """
    if address is None:
        # Ray listens on every interface otherwise, whatever address it is given.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    else:
        _check_address(address)
    # Nothing is sent home, nothing logged twice, nothing printed: verbose=0 is silent in the old output only, and the
    # driver prints what is said of dead workers unless it is skipped. `Progress` and end.json say it.
    os.environ.update(
        RAY_DEDUP_LOGS_SKIP_REGEX=".",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_SCHEDULER_EVENTS="0",
        RAY_AIR_NEW_OUTPUT="0",
        # A relative path in a knob is meant from where the command was given, not from a trial's folder.
        RAY_CHDIR_TO_TRIAL_DIR="0",
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        # Tune's own account of all trials, written again and again: the folders are what a second run reads.
        TUNE_GLOBAL_CHECKPOINT_S=str(10**9),
    )
    import ray  # reads the environment when it is imported

    before = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                object_store_memory=_OBJECT_STORE_BYTES,
            )
        else:
            _check_token(address)
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
            except ConnectionError as error:
                raise ValueError(f"--address {address}: {error}") from None
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto", or a name that Ray knows
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ValueError(f"--address {address}: nothing answers there: {error}") from None


def _check_token(address: str) -> None:
    """Ray itself would try for 20 s, and not say why in the end."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        if re.fullmatch(r"[^:/]+:\d+", address):
            GcsClient(address=address)
    except AuthenticationError:
        raise ValueError(
            f"--address {address}: it wants a token, and this process has none or another: set RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, as on the cluster's nodes"
        ) from None


def resources(trial: "Trial") -> dict[str, float]:
    """What each worker of a trial is booked with, as Ray books it; memory in bytes."""
    runtime = trial.runtime
    return {"CPU": runtime.cpus, "GPU": runtime.gpus, "memory": int(runtime.memory_gib * 2**30)}


def check_resources(trials: "Iterable[Trial]") -> None:
    """Each of a trial's workers must fit into one machine, or it would wait for ever.

    Raises:
        ValueError: the knobs of one that does not, and what there is.
    """
    machines = [node["Resources"] for node in alive_nodes()]
    for trial in trials:
        runtime = trial.runtime
        if sum(_workers_in(machine, resources(trial)) for machine in machines) < runtime.workers:
            there = "; ".join(
                f"{machine.get('CPU', 0):g} CPUs, {machine.get('GPU', 0):g} GPUs, {machine['memory'] / 2**30:.1f} GiB"
                for machine in machines
            )
            raise ValueError(
                f"runtime.workers = {runtime.workers}, runtime.cpus = {runtime.cpus}, runtime.gpus = {runtime.gpus}, "
                f"runtime.memory_gib = {runtime.memory_gib}: there is not as much room, only {there}"
            )


def _workers_in(machine: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many of a trial's workers fit."""
    return min(int(machine.get(key, 0) / value) for key, value in wanted.items() if value)


def alive_nodes() -> list[dict[str, dict[str, float]]]:
    """The machines of the cluster, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
