"""What a terminal shows of trials."""

from dino_lab import terminal
from dino_lab.orchestration.status import TrialStatus


def test_a_trial_shows_its_collapse_and_those_that_it_left() -> None:
    trials = [
        TrialStatus("a", "both", 0, 2, state="finished", step=500, left=(("constant", 30, 210),)),
        TrialStatus("b", "hot", 0, 2, state="stopped", step=180, verdict="uniform", onset_step=80),
    ]
    column = next(each for each in terminal.trial_table(trials).columns if each.header == "collapse")
    assert list(column.cells) == ["none, constant 30 to 210", "uniform from step 80"]
