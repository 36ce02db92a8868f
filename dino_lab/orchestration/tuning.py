"""Ray Tune's side of a run: it is handed trials one by one, gives each a process, and takes up again what dies.

Import it once Ray is there (`cluster.connected`): Ray reads its environment when it is imported.
"""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from dino_lab.core.records import Record
from dino_lab.core.trial import Trial
from dino_lab.orchestration.cluster import resources
from dino_lab.orchestration.folder import Train
from dino_lab.orchestration.worker import work

# Tune knows how actors die, but not of this one (seen in 2.60): the first worker that Ray killed for its memory would
# end the whole sweep. So it is told that this is a death of an actor too, and takes the trial up again.
OutOfMemoryError.__bases__ = (RayActorError,)
OutOfMemoryError._preempted = False  # type: ignore[attr-defined]

_RETRIES = 2


class Source(Protocol):
    """Where trials come from."""

    def ask(self) -> Trial | None:
        """The next one; None if others must end first.

        Raises:
            StopIteration: there are no more.
        """

    def report(self, trial_id: str, record: Record) -> bool:
        """A record of this one; returns whether it is to be stopped."""

    def tell(self, trial_id: str) -> None:
        """Tune is done with this one: it has ended, was stopped or was given up."""


class Watcher(Protocol):
    """Who wants to know how it goes."""

    def tick(self) -> None:
        """Some time has passed."""

    def retried(self) -> None:
        """An attempt failed or was killed, and the trial is taken up again."""

    def lost(self, trial_id: str, error: str) -> None:
        """A trial has been given up."""


def fit(
    source: Source, watcher: Watcher, lab: Path, *, concurrency: int | None, ahead: int, train: Train | None
) -> None:
    """Trains what the source hands out, as many at a time as there is room for; returns early on Ctrl-C.

    Args:
        ahead: Trials that may be asked for before there is room for them. On a cluster as many start side by side.
    """
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(ahead)
    with tempfile.TemporaryDirectory(prefix="dino-lab-") as scratch:
        tune.Tuner(
            tune.with_resources(functools.partial(work, lab=lab, train=train), _bundles),
            tune_config=tune.TuneConfig(
                search_alg=_Handing(source),
                scheduler=_Pruning(source),
                num_samples=-1,
                max_concurrent_trials=concurrency,
                # The next trial gets the process of one that has ended: starting one takes longer than a small trial.
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                callbacks=[_Telling(watcher)],
                verbose=0,
            ),
        ).fit()


def _bundles(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    trial = Trial.of(json.loads(config["settings"]))
    return tune.PlacementGroupFactory([resources(trial)] * trial.runtime.workers)


class _Unsaved:
    """What Tune would write to disk with its own state, though nobody reads it back, and it cannot be written."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Handing(_Unsaved, Searcher):
    """Hands Tune the source's trials, and tells it of their ends."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._by_tune_id: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, str] | None:
        try:
            trial = self._source.ask()
        except StopIteration:
            return Searcher.FINISHED  # type: ignore[return-value]
        if trial is None:
            return None
        self._by_tune_id[trial_id] = trial.identity
        return {"trial": trial.identity, "settings": trial.model_dump_json()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._source.tell(self._by_tune_id.pop(trial_id))

    def save(self, checkpoint_path: str) -> None:
        """Nobody restores it."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""


class _Pruning(_Unsaved, FIFOScheduler):
    """Stops what the source wants stopped."""

    def __init__(self, source: Source) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source = source

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        # Tune makes a result of its own when a trial has ended, without a record.
        made = result.get("record")
        pruned = made and self._source.report(trial.config["trial"], Record(**json.loads(made)))
        return self.STOP if pruned else self.CONTINUE


class _Telling(_Unsaved, tune.Callback):
    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._watcher.tick()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watcher.retried()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watcher.lost(trial.config["trial"], Path(trial.error_file).read_text())
