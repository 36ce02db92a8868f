"""Training of one trial: the one place that knows the order of events."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dino_lab.core import checkpoint, records
from dino_lab.core.checkpoint import CHECKPOINT
from dino_lab.core.data.batches import Batches
from dino_lab.core.data.crops import whole
from dino_lab.core.data.sources import ImageSet
from dino_lab.core.diagnostics import signals
from dino_lab.core.diagnostics.collapse import Verdict
from dino_lab.core.methods.method import Batch, Surroundings, joined
from dino_lab.core.optimizers import set_schedule
from dino_lab.core.records import Record
from dino_lab.core.schedules import Now
from dino_lab.core.trial import Trial

_EVAL_BATCH = 256
_PIXELS_SIZE = 32
"""Side to which larger images are shrunk for k-NN of raw pixels, which would else need all of the memory."""
_STEPS = 1 << 32  # more than any trial has: seeds of steps meet neither each other nor seeds of weights


class Diverged(RuntimeError):
    """The loss is not a number any more: the end state of a trial, not a fault of the lab."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss of step {step} is not finite")
        self.step = step


def train(trial: Trial, *, workdir: Path, resume_from: Path | None = None) -> Iterator[Record]:
    """Trains a student, with its teacher if the method has one, and yields what they show of themselves.

    A record at step 0 (the untrained network), every `runtime.log_period_steps`, at each evaluation and at the end. The
    latest checkpoint lies at workdir/checkpoint.pt, always behind the records: it is written when the record
    of its step has been taken. Resumed, it yields the records that follow the checkpoint, the same bits on CPU.

    Raises:
        Diverged: the loss is not finite.
        RuntimeError: `resume_from` cannot be read.
        ValueError: `resume_from` is another trial's, or a checkpoint that the method asks for is not there.
    """
    device = torch.device(trial.runtime.device)

    # ------------------------------------------------------------------ data
    data_dir = Path(trial.runtime.data_dir) if trial.runtime.data_dir else workdir / "data"
    train_set, test_set = trial.data.build("train", data_dir), trial.data.build("test", data_dir)
    batches = Batches(train_set, batch_size=trial.batch_size, seed=trial.seed, crops=trial.crops)
    steps_per_epoch = batches.steps_per_epoch
    steps = trial.epochs * steps_per_epoch

    # ---------------------------------------------------------------- method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        backbone = trial.backbone.build(trial.crops.global_crops_size)
        surroundings = Surroundings(
            len(train_set.classes["class"]),
            image_size=trial.crops.global_crops_size,
            global_crops_number=trial.crops.global_crops_number,
            trials_dir=workdir.parent,
        )
        method = trial.method.build(backbone, surroundings).to(device)

    # ------------------------------------------------------------- optimiser
    optimizer = trial.optimizer.build(method.student)

    # ---------------------------------------------------------------- resume
    first_step, verdict = 0, Verdict()
    if resume_from:
        state = checkpoint.load(resume_from, device=device)
        if state["trial"] != trial.identity:
            raise ValueError(f"checkpoint {resume_from} is of trial {state['trial']}, not of {trial.identity}")
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, verdict = state["step"], Verdict(**state["verdict"])
    else:
        yield Record(
            0, 0.0, time.time(), _evaluate(trial, method.encoders(), train_set, test_set, device, untrained=True)
        )

    # ------------------------------------------------------------------ loop
    seconds, steps_timed = 0.0, 0
    loader = batches.load(range(first_step, steps), loader_workers=trial.runtime.loader_workers)
    for step in range(first_step, steps):
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
        # Drop path is a pure function of (seed, step): nothing random outlives a step, so a resume needs no state.
        with torch.random.fork_rng():
            torch.manual_seed((trial.seed + 1) * _STEPS + done)
            for part in batch.split(trial.accumulation_steps):
                with torch.autocast(device.type, torch.bfloat16, trial.precision == "bf16"):
                    outcome = method.loss(part, now)
                if not torch.isfinite(outcome.loss):
                    raise Diverged(done)
                (outcome.loss / trial.accumulation_steps).backward()
                if recorded:
                    outcomes.append(replace(outcome, loss=outcome.loss.detach()))

        for parameter in method.held(now):
            parameter.grad = None
        gradient_norm = trial.optimizer.clip(method.student.parameters())
        optimizer.step()
        method.after_step(now)
        seconds, steps_timed = seconds + time.perf_counter() - started, steps_timed + 1

        if recorded:
            outcome = joined(outcomes)
            measured: dict[str, float | Tensor] = outcome.measures | {
                records.LOSS: outcome.loss,
                records.EMBEDDING_STD: signals.spread(outcome.features),
                records.GRADIENT_NORM: gradient_norm,
                records.LR: lr,
                records.WEIGHT_DECAY: weight_decay,
                records.IMAGES_PER_SECOND: steps_timed * trial.batch_size / seconds,
            }
            if outcome.targets is not None:
                measured |= {
                    records.MARGINAL_ENTROPY: signals.marginal_entropy(outcome.targets),
                    records.ENTROPY_FRACTION: measured[records.TEACHER_ENTROPY] / math.log(outcome.targets.shape[-1]),
                }
            if outcome.outputs is not None:
                measured[records.OUTPUT_STD] = signals.spread(outcome.outputs)
            values = {name: float(value) for name, value in measured.items()}
            out_dim = None if outcome.targets is None else outcome.targets.shape[-1]
            verdict = verdict.after(done, values, out_dim=out_dim, bounds=trial.collapse)
            if evaluated:
                values |= _evaluate(trial, method.encoders(), train_set, test_set, device)
            yield Record(done, done / steps_per_epoch, time.time(), values, verdict.kind, verdict.onset_step)
            seconds, steps_timed = 0.0, 0

        if done == steps or done % trial.runtime.checkpoint_period_steps == 0:
            state = {
                "trial": trial.identity,
                "step": done,
                "epoch": done // steps_per_epoch,
                "finished": done == steps,
                "judged": next(iter(method.encoders())),
                "method": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "verdict": vars(verdict),
            }
            checkpoint.save(workdir / CHECKPOINT, state)


def _evaluate(
    trial: Trial,
    encoders: dict[str, nn.Module],
    train_set: ImageSet,
    test_set: ImageSet,
    device: torch.device,
    *,
    untrained: bool = False,
) -> dict[str, float]:
    """k-NN of teacher and student; of the untrained network, which both still are, and of raw pixels beside it.

    The first encoder is judged on every factor: the teacher's, or the student's where there is no teacher.
    """
    knn = trial.evals.knn
    bank_images, size = train_set.images[: knn.bank_images], trial.crops.global_crops_size

    def top1(network: nn.Module, size: int = size) -> Callable[[str], float]:
        bank, queries = (_features(network, images, size, device) for images in (bank_images, test_set.images))
        return lambda factor: knn.top1(
            bank, train_set.labels[factor][: knn.bank_images], queries, test_set.labels[factor]
        )

    factors = [factor for factor in train_set.labels if factor != "class"]
    first, *others = encoders.values()
    judged = top1(first)
    values = {records.KNN: judged("class")} | {records.FACTOR_KNN + factor: judged(factor) for factor in factors}
    if untrained:
        pixels = top1(nn.Flatten(), min(size, _PIXELS_SIZE))
        values |= {records.STUDENT_KNN: values[records.KNN], records.PIXELS_KNN: pixels("class")}
        return values | {records.FACTOR_PIXELS_KNN + factor: pixels(factor) for factor in factors}
    values[records.STUDENT_KNN] = top1(others[0])("class") if others else values[records.KNN]
    return values


@torch.inference_mode()
def _features(
    network: nn.Module, images: UInt8[Tensor, "N H W 3"], size: int, device: torch.device
) -> Float[Tensor, "N D"]:
    """Features of whole images, on the host; drop path and batch normalisation as in use, not as in training."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    features = torch.cat([network(whole(part, size).to(device)).cpu() for part in images.split(_EVAL_BATCH)])
    for module, training in modes:
        module.training = training
    return features
