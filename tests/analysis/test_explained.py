"""The picture of one run: what is drawn where, and that the same records draw the same bytes."""

import math

import pytest

from analysis import explained, figures
from dino_lab.core import records as names
from dino_lab.core.records import Record

K = 256


def of_targets(step: int) -> Record:
    values = {
        names.LOSS: 4.0,
        names.TEACHER_ENTROPY: 0.5 * math.log(K),
        names.KL: 0.1 * math.log(K),
        names.MUTUAL_INFORMATION: 0.2 * math.log(K),
        names.PROTOTYPES_NUMBER: float(K),
    }
    return Record(step, step / 10, 0.0, values | ({names.KNN: 40.0} if step % 20 == 0 else {}))


def drawn(made, **options):
    figure = explained.trial_curves(made, **{"title": "trial", "onset_step": None} | options)
    return {line.get_label(): line for axes in figure.axes for line in axes.lines}, figure


def test_entropies_are_drawn_as_fractions_of_ln_k_and_the_onset_as_a_line():
    lines, figure = drawn([of_targets(step) for step in range(10, 60, 10)], onset_step=30)
    assert lines["teacher entropy"].get_ydata() == pytest.approx([0.5] * 5)
    assert lines["KL of teacher and student"].get_ydata() == pytest.approx([0.1] * 5)
    assert lines["mutual information of image and prototype"].get_ydata() == pytest.approx([0.2] * 5)
    assert list(lines["k-NN of the class (right)"].get_xdata()) == [20, 40]
    assert list(lines["onset"].get_xdata()) == [30, 30]
    assert figure.axes[0].get_title(loc="left") == "trial"


def test_an_onset_at_the_first_step_is_marked_too():
    lines, _ = drawn([of_targets(step) for step in (0, 10)], onset_step=0)
    assert list(lines["onset"].get_xdata()) == [0, 0]


def test_knn_is_in_percent_on_the_same_lines_as_the_fractions():
    _, figure = drawn([of_targets(step) for step in (10, 20)])
    left, right = figure.axes
    assert right.get_ylim() == pytest.approx([100 * limit for limit in left.get_ylim()])
    assert left.get_ylim()[1] > 1.01  # where all of it is ln K, the line is not on the edge


@pytest.mark.parametrize("losses", [(9.0, math.nan, 8.0), (9.0, math.inf, math.inf), (math.nan, math.nan, math.nan)])
def test_what_is_not_finite_is_a_gap(losses):
    made = [Record(step, math.nan, math.nan, {names.LOSS: loss}) for step, loss in enumerate(losses)]
    lines, figure = drawn(made, onset_step=1)
    assert list(lines["loss"].get_ydata()) == pytest.approx(losses, nan_ok=True)
    assert all(map(math.isfinite, figure.axes[0].get_ylim()))
    assert figures.render(figure, "png")


def test_without_a_collapse_there_is_no_onset():
    assert "onset" not in drawn([of_targets(step) for step in (10, 20)])[0]


def test_where_there_are_no_entropies_the_loss_is_drawn():
    made = [Record(step, math.nan, math.nan, {names.LOSS: 8.0 - step, names.OUTPUT_STD: 0.4}) for step in range(4)]
    lines, _ = drawn(made, unit="epoch")
    assert list(lines["loss"].get_ydata()) == [8, 7, 6, 5]
    assert "teacher entropy" not in lines
    with_k = [Record(r.step, r.epoch, r.seconds, r.values | {names.PROTOTYPES_NUMBER: float(K)}) for r in made]
    assert drawn(with_k)[0]["loss"].get_ydata() == pytest.approx([loss / math.log(K) for loss in (8, 7, 6, 5)])


def test_the_same_records_draw_the_same_bytes():
    made = [of_targets(step) for step in range(10, 60, 10)]
    one, other = (figures.render(drawn(made, onset_step=20)[1], "png") for _ in range(2))
    assert one == other
