"""Training of one trial: the one place that knows the order of events."""

import contextlib
import json
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dino_lab.core import checkpoint, distributed, records
from dino_lab.core.checkpoint import CHECKPOINT
from dino_lab.core.data.batches import Batches
from dino_lab.core.diagnostics import signals
from dino_lab.core.diagnostics.collapse import Verdict
from dino_lab.core.diagnostics.prototypes import PrototypeUse
from dino_lab.core.evaluation import opened
from dino_lab.core.methods.method import Batch, Surroundings, joined
from dino_lab.core.networks.spanning import spanning
from dino_lab.core.optimizers import set_schedule
from dino_lab.core.records import Record
from dino_lab.core.schedules import Now
from dino_lab.core.trial import Trial

DATA = "data.json"
"""Beside the checkpoint: what was trained on and evaluated."""
_STEPS = 1 << 32  # more than any trial has: seeds of steps meet neither each other nor seeds of weights


class Diverged(RuntimeError):
    """The loss is not a number any more: the end state of a trial, not a fault of the lab."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss of step {step} is not finite")
        self.step = step


def train(trial: Trial, *, workdir: Path, resume_from: Path | None = None) -> Iterator[Record]:
    """Trains a student, with its teacher if the method has one, and yields what they show of themselves.

    A record at step 0 (the untrained network), every `runtime.log_period_steps`, at each evaluation and at the end,
    which a collapse may bring early (`collapse.policy`). The
    latest checkpoint lies at workdir/checkpoint.pt, always behind the records: it is written when the record
    of its step has been taken. Resumed, it yields the records that follow the checkpoint, the same bits on CPU. What
    was trained on and judged is told in workdir/data.json.

    Called by each process of a `distributed.group`, all of them train one trial, the same up to rounding as one process
    alone, and read the same images and checkpoint. Rank 0 alone yields records and writes files: the others are to be
    asked once, and yield nothing.

    Raises:
        Diverged: the loss is not finite; on every rank.
        RuntimeError: `resume_from` cannot be read, or another rank is gone.
        ValueError: `resume_from` is another trial's or of other images, a data set or a checkpoint that the method asks
            for is not there, or images cannot be decoded.
    """
    device = torch.device(trial.runtime.device)
    is_first = distributed.rank() == 0

    # ------------------------------------------------------------------ data
    data_dir = Path(trial.runtime.data_dir) if trial.runtime.data_dir else workdir / "data"
    images, evaluation = opened(trial, data_dir)
    data = {"training": images, **evaluation.images}
    digests = {role: image_set.digest for role, image_set in data.items()}
    batches = Batches(
        images,
        batch_size=trial.batch_size,
        seed=trial.seed,
        crops=trial.crops,
        # Another process cannot hand over what lies on a GPU.
        device=torch.device("cpu") if trial.runtime.loader_workers else device,
        parts=trial.accumulation_steps,
    )
    steps_per_epoch = batches.steps_per_epoch
    steps = trial.epochs * steps_per_epoch
    bounds = trial.collapse.over(steps)

    # ---------------------------------------------------------------- method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        backbone = trial.backbone.build(trial.crops.global_crops_size)
        surroundings = Surroundings(
            len(images.classes.get("class", ())),
            image_size=trial.crops.global_crops_size,
            global_crops_number=trial.crops.global_crops_number,
            trials_dir=workdir.parent,
        )
        method = spanning(trial.method.build(backbone, surroundings)).to(device)

    # ------------------------------------------------------------- optimiser
    optimizer = trial.optimizer.build(method.student)

    # ---------------------------------------------------------------- resume
    first_step, verdict, seconds, use = 0, Verdict(), 0.0, PrototypeUse()
    if resume_from:
        state = checkpoint.load(resume_from, device=device)
        if state["trial"] != trial.identity:
            raise ValueError(f"checkpoint {resume_from} is of trial {state['trial']}, not of {trial.identity}")
        for role, image_set in data.items():
            if state["data"].get(role) != image_set.digest:
                raise ValueError(
                    f"checkpoint {resume_from} is of other images for {role} than are in {image_set.source}"
                )
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        use.load_state_dict(state["use"])
        first_step, verdict, seconds = state["step"], Verdict(**state["verdict"]), state["seconds"]
    if is_first:
        with checkpoint.replacing(workdir / DATA) as file:
            file.write(json.dumps({role: image_set.facts for role, image_set in data.items()}, indent=2).encode())
    if not resume_from:
        if "pictures" in trial.evals.at_end:
            evaluation.picture(method.encoders(), 0, workdir)
        values = evaluation.untrained(method.encoders())
        if is_first:
            yield Record(0, 0.0, time.time(), values)

    # ------------------------------------------------------------------ loop
    recorded_step, recorded_seconds = first_step, seconds
    _forget_peak_memory(device)
    stopped = trial.collapse.stops(first_step, verdict)
    ahead = range(first_step, first_step if stopped else steps)
    loader = batches.load(ahead, loader_workers=trial.runtime.loader_workers)
    for step in ahead:
        started = time.perf_counter()
        done = step + 1
        evaluated = done == steps or done % (trial.evals.every_epochs * steps_per_epoch) == 0
        recorded = evaluated or done % trial.runtime.log_period_steps == 0

        now = Now(step, steps=steps, steps_per_epoch=steps_per_epoch, measured=recorded)
        lr, weight_decay = trial.optimizer.lr_at(now, batch_size=trial.batch_size), trial.optimizer.weight_decay_at(now)
        set_schedule(optimizer, lr=lr, weight_decay=weight_decay)

        batch = Batch(*(part.to(device, non_blocking=True) for part in next(loader)))

        optimizer.zero_grad()
        outcomes = []
        share = len(batch.labels) // trial.accumulation_steps
        # Drop path is a pure function of (seed, step): nothing random outlives a step, so a resume needs no state.
        with distributed.draws((trial.seed + 1) * _STEPS + done, images=share):
            for part in batch.split(trial.accumulation_steps):
                with torch.autocast(device.type, torch.bfloat16, trial.precision == "bf16"):
                    outcome = method.loss(part, now)
                if not torch.isfinite(distributed.mean(outcome.loss)):
                    if is_first:
                        yield Record(done, done / steps_per_epoch, time.time(), {}, "diverged", done, verdict.left)
                    raise Diverged(done)
                (outcome.loss / trial.accumulation_steps).backward()
                if outcome.targets is not None:
                    use.see(outcome.targets)
                if recorded:
                    outcomes.append(replace(outcome, loss=outcome.loss.detach()))

        for parameter in method.held(now):
            parameter.grad = None
        distributed.average_gradients(method.student.parameters())
        norms = signals.gradient_norms(method.student) if recorded else {}
        gradient_norm = trial.optimizer.clip(method.student.parameters())
        optimizer.step()
        method.after_step(now)
        use.end_step()
        seconds += time.perf_counter() - started

        if recorded:
            outcome = joined(outcomes)
            measured: dict[str, float | Tensor] = {
                **outcome.measures,
                **use.measures(),
                **signals.of_features(outcome.features),
                **signals.of_outputs(outcome.outputs),
                records.LOSS: outcome.loss,
                records.GRADIENT_NORM: gradient_norm,
                **{records.GRADIENT_NORM_OF + part: norm for part, norm in norms.items()},
                records.LR: lr,
                records.WEIGHT_DECAY: weight_decay,
                records.IMAGES_PER_SECOND: (done - recorded_step) * trial.batch_size / (seconds - recorded_seconds),
                records.TRAIN_MINUTES: seconds / 60,
                records.PEAK_MEMORY: distributed.gather(torch.tensor([_peak_memory_mib(device)]), dim=0).max(),
            }
            encoders = method.encoders()
            if "teacher" in encoders:
                measured[records.TEACHER_DISTANCE] = signals.distance(encoders["teacher"], encoders["student"])
            if outcome.targets is not None:
                fraction = measured[records.TEACHER_ENTROPY] / math.log(outcome.targets.shape[-1])
                measured[records.ENTROPY_FRACTION] = fraction
            values = {name: float(value) for name, value in measured.items()}
            verdict = verdict.after(done, values, bounds=bounds)
            stopped = distributed.of_first(trial.collapse.stops(done, verdict))
            if evaluated or stopped:
                names = trial.evals.at_end if done == steps or stopped else trial.evals.during
                values |= evaluation.trained(encoders, names)
                if "pictures" in names:
                    evaluation.picture(encoders, done, workdir)
            said = (verdict.kind, verdict.onset_step, verdict.left)
            if is_first:
                yield Record(done, done / steps_per_epoch, time.time(), values, *said)
            recorded_step, recorded_seconds = done, seconds

        if is_first and (done == steps or stopped or done % trial.runtime.checkpoint_period_steps == 0):
            state = {
                "trial": trial.identity,
                "step": done,
                "epoch": done // steps_per_epoch,
                "finished": done == steps,
                "data": digests,
                "seconds": seconds,
                "judged": next(iter(method.encoders())),
                "method": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "use": use.state_dict(),
                "verdict": vars(verdict),
            }
            checkpoint.save(workdir / CHECKPOINT, state)
        if stopped:
            return


def _forget_peak_memory(device: torch.device) -> None:
    """What came before the first step, as imports, the first evaluation or another trial did, does not count; of the
    host's memory on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, on a Mac
