"""Trials -> Ray Tune: each in its own process, retried, resumed from its folder, and nothing finished done twice.

Ray owns processes and resources, not state: a second `run` is a new Tuner over what is unfinished.
Ray and MLflow are imported where they are used: workers import this module too, and asking for help must be quick.
"""

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_lab.core.records import ENTROPY_FRACTION, IMAGES_PER_SECOND, KNN
from dino_lab.core.settings import Knob
from dino_lab.orchestration.folder import (
    End,
    Train,
    TrialFolder,
    TrialStatus,
    is_locked,
    locked,
    refreshed,
    run_trial,
    status,
)

if TYPE_CHECKING:
    from dino_lab.ablation import LabelledTrial
    from dino_lab.core.trial import Trial
    from dino_lab.orchestration.tracking import Mirror

_FREE_BYTES = 2**30
_RETRIES = 2
_TICK_SECONDS = 1.0
_OBJECT_STORE_BYTES = 100 * 2**20
"""Trials share nothing through Ray; its default is a third of the memory."""
_DYING_SECONDS = 20.0
"""How long workers may take to die after Ray has been stopped."""


@dataclass(frozen=True)
class Progress:
    """What a live table shows."""

    trials: tuple[TrialStatus, ...]
    mirror_error: str | None
    """Why MLflow is behind the journals, None while it is not."""
    retries: int
    """Attempts that failed or were killed and were taken up again."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    trials: tuple[TrialStatus, ...]
    skipped: int
    """Trials that had ended before, in this or another ablation."""
    seconds: float
    mirror_error: str | None
    retries: int

    @property
    def notes(self) -> list[str]:
        """What a person must know before going on; nothing if all is well."""
        unfinished = sum(trial.is_open for trial in self.trials)
        failed = [f"{trial.row} s{trial.seed}" for trial in self.trials if trial.state == "failed"]
        notes = []
        if self.retries:
            notes.append(f"{self.retries} attempts failed or were killed, and were taken up from their checkpoints")
        if unfinished:
            notes.append(
                f"{unfinished} of {len(self.trials)} trials are unfinished; "
                "the same command again goes on where each of them stopped"
            )
        if failed:
            notes.append(f"failed: {', '.join(failed)}; the same command again tries them once more")
        if self.mirror_error:
            notes.append(
                "MLflow is behind: the records are safe in the trials' journals and the next run "
                f"sends them ({self.mirror_error})"
            )
        return notes


def run(
    labelled: "Sequence[LabelledTrial]",
    *,
    name: str,
    baseline_name: str,
    overrides: Mapping[str, Knob],
    note: str,
    baseline_row: str,
    published: str | None,
    paper_rows: Mapping[str, str],
    lab: Path,
    concurrency: int | None = None,
    address: str | None = None,
    tracking_uri: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    train: Train | None = None,
) -> Summary:
    """Trains what is unfinished, in the given order, and mirrors every trial into MLflow.

    Ctrl-C and SIGTERM stop all trials where they are and return. Call it from the main thread.

    Args:
        concurrency: Trials at a time; None for as many as the resources take.
        address: A running Ray cluster; None starts a private one, reachable from this machine only.
        tracking_uri: An MLflow server; None for the lab's own store.
        on_progress: Called about once a second; it must not raise.
        train: In place of `dino_lab.core.trainer.train`.

    Raises:
        ValueError: if another run works in this lab, the disk is full, or a trial asks for more than a machine has.
    """
    from dino_lab.orchestration.tracking import Mirror, Sweep

    start = time.monotonic()
    lab = lab.resolve()
    labelled = [replace(each, trial=each.trial.but({"runtime.data_dir": str(lab / "data")})) for each in labelled]
    trials = {each.trial.identity: each.trial for each in labelled}
    with locked(lab / "run.lock", patience_seconds=0, busy=f"{lab} is in use: a run is going on there"):
        _check_disk(lab)
        ended = {trial_id for trial_id in trials if (end := TrialFolder(lab, trial_id).end()) and end.is_final}
        unfinished = {trial_id: trial for trial_id, trial in trials.items() if trial_id not in ended}
        mirror = Mirror(
            lab,
            Sweep(name, baseline_name, overrides, note, baseline_row, published, paper_rows, labelled),
            tracking_uri=tracking_uri,
        )
        watch = _Watch(lab, status(lab, labelled), mirror, on_progress)
        watch.show()
        try:
            if unfinished:
                with _ray(address):
                    _check_resources(unfinished)
                    mirror.catch_up()
                    for wave in _waves(unfinished):
                        _fit(wave, lab, concurrency=concurrency, watch=watch, train=train)
                        watch.record_lost_trials()
                        watch.show()
                        if any(trial.is_open and trial.trial_id in wave for trial in watch.trials):
                            break  # Ctrl-C: Tune returns as if all were well
            else:
                mirror.catch_up()
        except KeyboardInterrupt:
            # Before or after Tune's own loop, which returns on Ctrl-C. The folders say what is unfinished.
            pass
        finally:
            shutil.rmtree(lab / "ray", ignore_errors=True)
            _await_dying_workers(lab, unfinished)
            watch.record_lost_trials()
            mirror.close()
        watch.show()
    return Summary(watch.trials, len(ended), time.monotonic() - start, mirror.error, watch.retries)


def _waves(trials: "Mapping[str, Trial]") -> "Iterator[dict[str, Trial]]":
    """The trials in their order, those that need another's checkpoint after those that have it to give."""
    left = dict(trials)
    while left:
        wave = {each: trial for each, trial in left.items() if not left.keys() & set(map(str, trial.flat().values()))}
        yield wave
        left = {trial_id: trial for trial_id, trial in left.items() if trial_id not in wave}


def _fit(
    trials: "Mapping[str, Trial]", lab: Path, *, concurrency: int | None, watch: "_Watch", train: Train | None
) -> None:
    from ray import tune

    def bundle(config: dict[str, Any]) -> Any:
        return tune.PlacementGroupFactory([_resources(trials[config["trial"]])])

    values = {trial_id: trial.model_dump(mode="json") for trial_id, trial in trials.items()}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_work, trials=values, lab=lab, train=train), bundle),
        param_space={"trial": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrency),
        run_config=tune.RunConfig(
            storage_path=str(lab / "ray"),
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            callbacks=[_callback(watch)],
            verbose=0,
        ),
    )
    tuner.fit()


def _work(config: dict[str, Any], *, trials: dict[str, Any], lab: Path, train: Train | None) -> None:
    """One trial, in a worker. Nothing of torch is imported before the number of threads is set."""
    values = trials[config["trial"]]
    threads = str(max(1, int(values["runtime"]["cpus"])))
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
    import torch
    from ray import tune

    from dino_lab.core.trial import Trial

    torch.set_num_threads(int(threads))
    for record in run_trial(Trial.of(values), lab, train):
        shown = {key: record.values[key] for key in (ENTROPY_FRACTION, KNN, IMAGES_PER_SECOND) if key in record.values}
        tune.report({"step": record.step, "epoch": record.epoch, "verdict": record.verdict, **shown})


class _Watch:
    """What the driver knows of its trials, and whom it tells."""

    def __init__(
        self, lab: Path, trials: list[TrialStatus], mirror: "Mirror", on_progress: Callable[[Progress], None]
    ) -> None:
        self.trials = tuple(trials)
        self.retries = 0
        self._lab = lab
        self._mirror = mirror
        self._on_progress = on_progress
        self._errors: dict[str, str] = {}
        self._next_tick = 0.0

    def tick(self) -> None:
        """Once a second: the table and MLflow follow the journals."""
        if time.monotonic() < self._next_tick:
            return
        # As the last look saw them, so that the end of a trial is sent too.
        self._mirror.catch_up([trial.trial_id for trial in self.trials if trial.is_open])
        self.show()
        self._next_tick = time.monotonic() + _TICK_SECONDS

    def show(self) -> None:
        self.trials = tuple(refreshed(trial, self._lab) for trial in self.trials)
        self._on_progress(Progress(self.trials, self._mirror.error, self.retries))

    def lost(self, trial_id: str, error: str) -> None:
        """Tune has given the trial up."""
        self._errors[trial_id] = error

    def record_lost_trials(self) -> None:
        """A worker that was killed too often could not write its own end."""
        for trial_id, error in self._errors.items():
            folder = TrialFolder(self._lab, trial_id)
            if not folder.end():
                folder.write_end(End("failed", error, 0.0))


def _callback(watch: _Watch) -> Any:
    from ray import tune

    class Callback(tune.Callback):
        watch: _Watch

        def __getstate__(self) -> dict[str, Any]:
            # Tune writes its callbacks to disk with its own state; a terminal cannot be, and nobody reads it back.
            return {}

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            self.watch.tick()

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.watch.retries += 1

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.watch.lost(trial.config["trial"], str(trial.get_error()))

    callback = Callback()
    callback.watch = watch
    return callback


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Ray for the block. A private one listens on loopback, and dies with this process.

    SIGTERM does what Ctrl-C does meanwhile: Ray's own handler would abort.
    """
    if address is None:
        # Ray listens on every interface otherwise, whatever address it is given.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
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
    )
    import ray

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
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _resources(trial: "Trial") -> dict[str, float]:
    """As Ray books them; memory in bytes."""
    runtime = trial.runtime
    return {"CPU": runtime.cpus, "GPU": runtime.gpus, "memory": int(runtime.memory_gib * 2**30)}


def _check_resources(trials: "Mapping[str, Trial]") -> None:
    """A trial must fit into one machine, or it would wait for ever."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    for trial in trials.values():
        wanted = _resources(trial)
        if not any(all(machine.get(key, 0) >= value for key, value in wanted.items()) for machine in machines):
            runtime = trial.runtime
            there = "; ".join(
                f"{machine['CPU']:g} CPUs, {machine.get('GPU', 0):g} GPUs, {machine['memory'] / 2**30:.1f} GiB"
                for machine in machines
            )
            raise ValueError(
                f"runtime.cpus = {runtime.cpus}, runtime.gpus = {runtime.gpus}, "
                f"runtime.memory_gib = {runtime.memory_gib}: no machine has as much; there is {there}"
            )


def _check_disk(lab: Path) -> None:
    free = shutil.disk_usage(lab).free
    if free < _FREE_BYTES:
        raise ValueError(f"{lab}: {free / 2**30:.2f} GiB free, at least {_FREE_BYTES / 2**30:g} GiB are needed")


def _await_dying_workers(lab: Path, trial_ids: Mapping[str, Any]) -> None:
    """Ray returns before its workers are dead, and one that still trains is not interrupted."""
    deadline = time.monotonic() + _DYING_SECONDS
    while any(is_locked(TrialFolder(lab, each).lock) for each in trial_ids) and time.monotonic() < deadline:
        time.sleep(0.1)
