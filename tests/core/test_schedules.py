import numpy as np
import pytest

from dino_lab.core.schedules import Now, cosine, linear_warmup


def cosine_scheduler(
    base_value: float, final_value: float, steps: int, *, warmup_steps: int = 0, start_warmup_value: float = 0.0
) -> np.ndarray:
    """The reference's array of a schedule: utils.cosine_scheduler, with its names."""
    warmup = np.linspace(start_warmup_value, base_value, warmup_steps) if warmup_steps > 0 else np.array([])
    iters = np.arange(steps - warmup_steps)
    schedule = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * iters / len(iters)))
    return np.concatenate((warmup, schedule))


@pytest.mark.parametrize(("start", "end"), [(0.0005, 1e-6), (0.04, 0.4), (0.996, 1.0), (0.1, 0.1)])
@pytest.mark.parametrize(("steps", "warmup_steps"), [(50, 0), (50, 1), (50, 2), (50, 10), (50, 49), (1, 0)])
@pytest.mark.parametrize("warmup_start", [0.0, 0.001])
def test_every_step_is_the_references(
    start: float, end: float, steps: int, warmup_steps: int, warmup_start: float
) -> None:
    theirs = cosine_scheduler(start, end, steps, warmup_steps=warmup_steps, start_warmup_value=warmup_start)
    ours = [
        cosine(step, steps=steps, start=start, end=end, warmup_steps=warmup_steps, warmup_start=warmup_start)
        for step in range(steps)
    ]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_a_warm_up_may_last_for_the_whole_training() -> None:
    ours = [cosine(step, steps=5, start=1.0, end=0.0, warmup_steps=5) for step in range(5)]
    assert ours == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


def test_the_cosine_is_half_way_at_half_time() -> None:
    assert cosine(0, steps=100, start=1.0, end=0.5) == 1.0
    assert cosine(50, steps=100, start=1.0, end=0.5) == pytest.approx(0.75)
    assert 0.5 < cosine(99, steps=100, start=1.0, end=0.5) < 0.501


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 5, 10])
def test_every_epochs_teacher_temperature_is_the_references(warmup_epochs: int) -> None:
    theirs = np.concatenate((np.linspace(0.04, 0.07, warmup_epochs), np.ones(10 - warmup_epochs) * 0.07))
    ours = [linear_warmup(epoch, start=0.04, end=0.07, warmup_epochs=warmup_epochs) for epoch in range(10)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


# -------------------------------------------------------------------------------------- where training stands


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 10])
def test_an_epoch_is_the_number_of_epochs_done_and_ends_with_its_last_step(steps_per_epoch: int) -> None:
    steps = 4 * steps_per_epoch
    now = [Now(step, steps=steps, steps_per_epoch=steps_per_epoch, measured=False) for step in range(steps)]
    plain = [(epoch, step == steps_per_epoch - 1) for epoch in range(4) for step in range(steps_per_epoch)]
    assert [(each.epoch, each.ends_epoch) for each in now] == plain
