"""What runs in a worker's process: one trial after another, each into its folder. Nothing of MLflow or Optuna."""

import functools
import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dino_lab.core.records import Record
from dino_lab.orchestration.folder import Train, run_trial

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.util.placement_group import PlacementGroup

    from dino_lab.core.trial import Trial


def work(config: dict[str, Any], *, lab: Path, train: Train | None) -> None:
    """One trial, reported to Tune record by record.

    The process is warm: it may have trained another trial before.

    Args:
        config: The trial's settings as JSON, by "settings".
    """
    settings = json.loads(config["settings"])
    _set_threads(settings["runtime"]["cpus"])
    from ray import tune

    from dino_lab.core.trial import Trial

    trial = Trial.of(settings)
    if trial.runtime.workers > 1:
        train = functools.partial(_train_with_others, train=train)
    for record in run_trial(trial, lab, train):
        tune.report({"record": json.dumps(asdict(record))})  # as text: of a dict Tune would make a column each


def _set_threads(cpus: int) -> None:
    """Before anything of torch is imported; the same for all trials of a process."""
    os.environ.update(OMP_NUM_THREADS=str(cpus), MKL_NUM_THREADS=str(cpus), OPENBLAS_NUM_THREADS=str(cpus))
    import torch

    torch.set_num_threads(cpus)


# -------------------------------------------------- a trial over several processes


def _train_with_others(
    trial: "Trial", *, workdir: Path, resume_from: Path | None, train: Train | None
) -> Iterator[Record]:
    """Trains as rank 0, together with an actor for each other rank, in the bundles that the trial was given.

    Our own actors and not Ray Train: that starts a controller and a group of workers a trial, 27 s for a trivial one.
    """
    import ray
    from ray.util.placement_group import get_current_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from dino_lab.orchestration.cluster import resources

    address = _free_address(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    booked = resources(trial)
    others: list[Any] = [
        ray.remote(_Other)
        .options(
            num_cpus=booked["CPU"],
            num_gpus=booked["GPU"],
            memory=booked["memory"],
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                cast("PlacementGroup", get_current_placement_group()), placement_group_bundle_index=rank
            ),
        )
        .remote(trial.model_dump_json())
        for rank in range(1, trial.runtime.workers)
    ]
    calls = [
        other.train.remote(rank, address, workdir=workdir, resume_from=resume_from, train=train)
        for rank, other in enumerate(others, start=1)
    ]
    done = threading.Event()
    threading.Thread(target=_die_with, args=(calls, done), daemon=True).start()
    try:
        yield from _train_as(0, address, trial, workdir=workdir, resume_from=resume_from, train=train)
    finally:
        done.set()
        for other in others:
            ray.kill(other)


class _Other:
    """The process of a rank other than 0."""

    def __init__(self, settings: str) -> None:
        values = json.loads(settings)
        _set_threads(values["runtime"]["cpus"])
        from dino_lab.core.trial import Trial

        self._trial = Trial.of(values)

    def train(self, rank: int, address: str, *, workdir: Path, resume_from: Path | None, train: Train | None) -> None:
        """To the end; it yields nothing."""
        ranks = _train_as(rank, address, self._trial, workdir=workdir, resume_from=resume_from, train=train)
        for _ in ranks:
            pass


def _train_as(
    rank: int, address: str, trial: "Trial", *, workdir: Path, resume_from: Path | None, train: Train | None
) -> Iterator[Record]:
    import torch

    from dino_lab.core.distributed import group
    from dino_lab.core.trainer import train as train_dino

    device = torch.device(trial.runtime.device)
    with group(rank=rank, workers=trial.runtime.workers, address=address, device=device):
        yield from (train or train_dino)(trial, workdir=workdir, resume_from=resume_from)


def _die_with(calls: "Sequence[ObjectRef[None]]", done: threading.Event) -> None:
    """Ends this process when another rank's dies before all is done: then Tune takes the trial up from its checkpoint.

    Connections tell at once of a process that was killed, but not of a machine that is gone.
    """
    import ray

    left = list(calls)
    while left:
        ended, left = ray.wait(left)
        try:
            ray.get(ended)
        except ray.exceptions.RayTaskError:
            pass  # as of a loss that is not finite: this rank raises it too, or learns of it by its connection
        except ray.exceptions.RayActorError:
            if not done.is_set():
                os._exit(1)


def _free_address(host: str) -> str:
    with socket.create_server((host, 0)) as probe:
        return f"{host}:{probe.getsockname()[1]}"
