"""What happened to a trial, or to a run that others logged: verdict, evidence, what is known of its knobs, what to try.

Nothing is drawn or printed here. Of a trial its folder is read, and nothing else.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from dino_lab import logs
from dino_lab.advice import Advice, advice_against
from dino_lab.asking import find_trial
from dino_lab.core import records
from dino_lab.core.diagnostics.collapse import Collapse, Kind, Sign, Verdict
from dino_lab.core.records import Record
from dino_lab.core.trial import Trial
from dino_lab.lint import Finding, about_train_images, lint
from dino_lab.logs import Log
from dino_lab.orchestration.folder import State, TrialFolder

Known: TypeAlias = Literal["asked for", "in the log", "a guess"]


@dataclass(frozen=True)
class Evidence:
    """A signal past its bound: where the collapse began, and where it was seen last."""

    signal: str
    relation: str
    bound: float
    onset_step: int
    at_onset: float
    end_step: int
    at_end: float

    def __str__(self) -> str:
        values = f"{self.at_onset:.4g} at {self.onset_step}, {self.at_end:.4g} at {self.end_step}"
        return f"{self.signal} {self.relation} {self.bound:.4g}: {values}"


@dataclass(frozen=True)
class Past:
    """A collapse that was called and left."""

    kind: Kind
    first_step: int
    last_step: int


@dataclass(frozen=True)
class Explanation:
    """What is said of a trial."""

    trial_id: str
    state: State
    error: str | None
    records: int
    step: int
    """Of the last record."""
    steps: int | None
    """Of the whole run; None before the first step."""
    epochs: int
    kind: Kind
    onset_step: int | None
    onset_epoch: float | None
    onset_percent: float | None
    """Of the whole run."""
    first_sign: tuple[Kind, int] | None
    """What the collapse looked like when its signs began, and the step, if that was not its onset."""
    recorded: str
    """The verdict that stands in the journal, by the bounds of its day."""
    evidence: tuple[Evidence, ...]
    left: tuple[Past, ...]
    knn: tuple[float, float] | None
    """Of the class in percent: at the first and at the last evaluation."""
    findings: tuple[Finding, ...]
    advice: tuple[Advice, ...]

    @property
    def title(self) -> str:
        return _title(self.kind, self.onset_step, "step", self.onset_percent, self.onset_epoch)


@dataclass(frozen=True)
class Diagnosis:
    """What is said of a log that others wrote."""

    path: str
    form: str
    unit: str
    """What its steps are."""
    records: int
    first_step: int
    last_step: int
    kind: Kind
    onset_step: int | None
    onset_percent: float | None
    """Of the log."""
    first_sign: tuple[Kind, int] | None
    """As of `Explanation`."""
    judged_by: Literal["targets", "loss"]
    out_dim: int | None
    out_dim_is: Known | None
    evidence: tuple[Evidence, ...]
    left: tuple[Past, ...]
    notes: tuple[str, ...]
    """How it was read."""
    unknown: tuple[str, ...]
    """What it cannot tell."""
    advice: tuple[Advice, ...]
    read_as: dict[str, str]
    unused: tuple[str, ...]

    @property
    def title(self) -> str:
        return _title(self.kind, self.onset_step, self.unit, self.onset_percent, None)


def explain(trial_id: str, lab: Path) -> tuple[Explanation, list[Record]]:
    """What happened to a trial of this lab, and the records to draw.

    Raises:
        ValueError: there is no such trial.
    """
    trial, folder = find_trial(trial_id, lab), TrialFolder(lab, trial_id)
    journal, end = folder.records(), folder.end()
    last = journal[-1] if journal else Record(0, 0.0, 0.0)
    per_epoch = last.step / last.epoch if last.epoch else None
    steps = round(trial.epochs * per_epoch) if per_epoch else None
    bounds = trial.collapse.over(steps or 0)
    verdict, signs = _folded(journal, bounds)
    if end is not None and end.state == "diverged":  # where a loss is not finite there is nothing to judge
        verdict = replace(verdict, kind="diverged", onset_step=last.step)
    evidence = _evidence(signs, verdict)
    if verdict.kind == "not_started":
        evidence = _not_begun(journal, verdict, bounds)
    left = tuple(Past(*each) for each in verdict.left)
    onset = verdict.onset_step
    kinds = dict.fromkeys([verdict.kind, *(past.kind for past in left)])
    knn = [record.values[records.KNN] for record in journal if records.KNN in record.values]
    return Explanation(
        trial_id=trial_id,
        state=folder.state(),
        error=end.error if end else None,
        records=len(journal),
        step=last.step,
        steps=steps,
        epochs=trial.epochs,
        kind=verdict.kind,
        onset_step=onset,
        onset_epoch=None if onset is None or not per_epoch else onset / per_epoch,
        onset_percent=None if onset is None or not steps else 100 * onset / steps,
        first_sign=_first_sign(verdict),
        recorded=last.verdict,
        evidence=evidence,
        left=left,
        knn=(knn[0], knn[-1]) if knn else None,
        findings=tuple(lint(trial, train_images=_train_images(folder, trial))),
        advice=tuple(advice_against(kinds, trial, steps)),
    ), journal


def diagnose(path: Path, *, out_dim: int | None = None) -> tuple[Diagnosis, list[Record]]:
    """What happened in a run that others logged, and the records to draw.

    Args:
        out_dim: K; None takes it from the log, or guesses it from a plateau.

    Raises:
        ValueError: the file cannot be read; says what is allowed.
    """
    log = logs.read(path)
    prototypes, known = _prototypes(log, out_dim)
    shown = [_with_prototypes(record, prototypes) for record in log.records]
    first, last = shown[0].step, shown[-1].step
    by_targets = prototypes is not None and all(
        name in record.values
        for record in shown
        for name in (records.TEACHER_ENTROPY, records.KL, records.MUTUAL_INFORMATION)
    )
    if by_targets:
        certain = math.ceil(logs.CERTAIN * (last - first))
        bounds = Collapse().but({"certain_steps": certain})
        verdict, signs = _folded(shown, bounds)
        diverged = logs.broken_since(log)
        if diverged is not None:
            verdict = replace(verdict, kind="diverged", onset_step=diverged)
    else:
        verdict, signs = logs.of_loss(log, prototypes), logs.loss_signs(log, prototypes)
    onset, span = verdict.onset_step, last - first
    evidence = _evidence(signs, verdict)
    if verdict.kind == "not_started":
        evidence = _not_begun(shown, verdict, bounds) if by_targets else (_range(log),)
    left = tuple(Past(*each) for each in verdict.left)
    kinds = dict.fromkeys([verdict.kind, *(past.kind for past in left)])
    return Diagnosis(
        path=str(path),
        form=log.form,
        unit=log.unit,
        records=len(shown),
        first_step=first,
        last_step=last,
        kind=verdict.kind,
        onset_step=onset,
        onset_percent=None if onset is None or not span else 100 * (onset - first) / span,
        first_sign=_first_sign(verdict),
        judged_by="targets" if by_targets else "loss",
        out_dim=prototypes,
        out_dim_is=known,
        evidence=evidence,
        left=left,
        notes=(*log.notes, *_about_prototypes(log, prototypes, known), *_about_broken(log)),
        unknown=() if by_targets else tuple(_unknown(log, verdict, prototypes)),
        advice=tuple(advice_against(kinds)),
        read_as=log.read_as,
        unused=log.unused,
    ), shown


# ------------------------------------------------------------------------------------------------ verdict and evidence


def _folded(shown: Iterable[Record], bounds: Collapse) -> tuple[Verdict, list[tuple[int, Sign]]]:
    """The verdict, and what each record looked like on the way to it."""
    verdict, signs = Verdict(), []
    for record in shown:
        if math.isfinite(record.values.get(records.LOSS, math.nan)):
            signs.append((record.step, verdict.sign(record.values, bounds=bounds)))
        verdict = verdict.after(record.step, record.values, bounds=bounds)
    return verdict, signs


def _evidence(signs: Sequence[tuple[int, Sign]], verdict: Verdict) -> tuple[Evidence, ...]:
    """Bounds that the first and the last record of this kind have crossed since the onset."""
    since = verdict.onset_step or 0
    of_kind = [(step, sign.evidence) for step, sign in signs if sign.kind == verdict.kind and step >= since]
    if not of_kind:
        return ()
    (first_step, first), (last_step, last) = of_kind[0], of_kind[-1]
    return tuple(
        Evidence(
            at_first.signal, at_first.relation, at_first.bound, first_step, at_first.value, last_step, at_last.value
        )
        for at_first, at_last in zip(first, last, strict=True)
    )


def _first_sign(verdict: Verdict) -> tuple[Kind, int] | None:
    is_onset = verdict.first_sign == (verdict.kind, verdict.onset_step)
    return None if is_onset or verdict.kind not in records.COLLAPSES else verdict.first_sign


def _not_begun(shown: Sequence[Record], verdict: Verdict, bounds: Collapse) -> tuple[Evidence, ...]:
    """How far each rank and std is from where it was at the start, and how sharp targets have been."""
    of_steps = [record for record in shown if records.LOSS in record.values]
    first, last = of_steps[0], of_steps[-1]
    found = [
        Evidence(f"change of {name}", "<=", bounds.unmoved, first.step, 0.0, last.step, abs(last.values[name] / at - 1))
        for name, at in (verdict.started or {}).items()
        if name in last.values and not verdict.has_moved
    ]
    # Journals of an earlier lab have no K.
    if not verdict.has_been_sharp and records.PROTOTYPES_NUMBER in last.values:
        entropies = [
            record.values[records.TEACHER_ENTROPY] / math.log(record.values[records.PROTOTYPES_NUMBER])
            for record in (first, last)
        ]
        bound = bounds.uniform_entropy
        found.append(Evidence("teacher entropy / ln K", ">=", bound, first.step, entropies[0], last.step, entropies[1]))
    return tuple(found)


def _range(log: Log) -> Evidence:
    """Between which losses the whole log lies."""
    losses = log.losses
    widest = (max(losses) - min(losses)) / abs(losses[0])
    first, last = log.records[0].step, log.records[-1].step
    return Evidence("range of the loss over its first", "<=", logs.FLAT, first, 0.0, last, widest)


def _title(kind: Kind, onset: int | None, unit: str, percent: float | None, epoch: float | None) -> str:
    if onset is None:
        return records.VERDICTS[kind] if kind == "none" else kind
    of_run = [] if epoch is None else [f"epoch {epoch:.2f}"]
    of_run += [] if percent is None else [f"{percent:.0f} %"]
    return f"{kind} from {unit} {onset:,}" + (f" ({', '.join(of_run)})" if of_run else "")


def _train_images(folder: TrialFolder, trial: Trial) -> int | None:
    if folder.data.exists():
        images: int = json.loads(folder.data.read_text())["training"]["images"]
        return images
    return about_train_images(trial)


# --------------------------------------------------------------------------------------------------- logs of others


def _prototypes(log: Log, asked: int | None) -> tuple[int | None, Known | None]:
    """K, and who says so."""
    in_log = log.records[-1].values.get(records.PROTOTYPES_NUMBER)
    prototypes = round(in_log) if asked is None and in_log is not None else asked
    if prototypes is None:
        guess = logs.guessed_out_dim(log.losses)
        return guess, None if guess is None else "a guess"
    if prototypes < 2:
        raise ValueError(f"K = {prototypes}: must be 2 or more")
    return prototypes, "in the log" if asked is None else "asked for"


def _with_prototypes(record: Record, prototypes: int | None) -> Record:
    if prototypes is None:
        return record
    return replace(record, values=record.values | {records.PROTOTYPES_NUMBER: float(prototypes)})


def _about_prototypes(log: Log, prototypes: int | None, known: Known | None) -> list[str]:
    guess = logs.guessed_out_dim(log.losses)
    within = (
        ""
        if guess is None
        else (f"the last tenth of the log lies within {logs.GUESS_NATS} nats of ln {guess:,} = {math.log(guess):.4f}")
    )
    if known == "a guess":
        return [f"K = {prototypes:,} is a guess: {within}; --out-dim says what it is"]
    if prototypes is None:
        return [
            "K is not known, and no plateau at ln K tells it: losses are compared with the highest; --out-dim says it"
        ]
    if guess is not None and guess != prototypes:
        return [f"{within}, and not at ln {prototypes:,} = {math.log(prototypes):.4f}: is K = {prototypes:,} right?"]
    entropies = [r.values[records.TEACHER_ENTROPY] for r in log.records if records.TEACHER_ENTROPY in r.values]
    if entropies and max(entropies) > 1.001 * math.log(prototypes):
        return [f"a teacher entropy of {max(entropies):.4g} exceeds ln {prototypes:,}: it must be in nats, and K right"]
    return []


def _about_broken(log: Log) -> list[str]:
    if not log.broken:
        return []
    (first, _, _), (last, _, _) = log.broken[0], log.broken[-1]
    values = dict.fromkeys(f"{column} = {value}" for _, column, value in log.broken)
    note = f"not finite: {', '.join(values)}, from {log.unit} {first:,} to {last:,}"
    if any(column == "total_loss" for _, column, _ in log.broken) and log.form != "DINO":
        note += (
            ". Where the total alone is not, it may be KoLeo's, which is infinite for two images that are alike and "
            "has no neighbour in a batch of one (facebookresearch/dinov2#101, #314)"
        )
    return [note]


def _unknown(log: Log, verdict: Verdict, prototypes: int | None) -> list[str]:
    """What a loss alone does not tell, given what it looks like."""
    said = []
    if verdict.kind == "uniform":
        said.append(
            "a loss at ln K is entropy ln K and KL 0, or less of one and more of the other: log teacher entropy and "
            "KL apart"
        )
        if verdict.onset_step == log.records[0].step:
            said.append(
                "the loss is at ln K from the first record on: a student that has not begun is there as well as one "
                "that has followed its teacher to uniform targets" + _lr(log)
            )
    if verdict.kind == "one_prototype":
        said.append(
            "a loss near 0 says that targets are sharp and that the student has followed. Whether they are on one "
            "prototype, on two or three, or on one for each image, it does not say: count the prototypes in use"
        )
    if verdict.kind == "not_started":
        said.append("whether features move while the loss does not" + _lr(log))
    if verdict.kind in ("none", "not_started"):
        said.append(
            "targets that are the same for all images but wander, two or three prototypes, and outputs on a line or a "
            "plane do not show in a loss; nor does what the features are good for"
        )
    if prototypes is None and verdict.kind == "none":
        said.append("whether the loss is near ln K, without K")
    return said


def _lr(log: Log) -> str:
    rates = [record.values[records.LR] for record in log.records if records.LR in record.values]
    return f" (its learning rate rose to {max(rates):.2g})" if rates else ""
