"""The picture of one trial: what is drawn is what was recorded."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import explained, figures
from dino_lab.core.records import Record

K = 256


def shown(**values: list[float]) -> list[Record]:
    """Records every ten steps; a name's slash is written as two underscores."""
    names = {name.replace("__", "/"): of for name, of in values.items()}
    number = len(next(iter(names.values())))
    return [Record(10 * i, 0.1 * i, 1e9, {name: of[i] for name, of in names.items()}) for i in range(number)]


ENTROPIES = {
    "train__teacher_entropy": [2.0, 3.0, 5.0],
    "train__kl": [1.0, 0.5, 0.1],
    "targets__mutual_information": [0.5, 0.2, 0.0],
    "train__loss": [3.0, 3.5, 5.1],
    "targets__prototypes_number": [256.0] * 3,
}


def lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for axes in figure.axes
        for line in axes.lines
    }


def test_entropies_are_drawn_as_fractions_of_ln_k_over_their_steps() -> None:
    drawn = lines(explained.trial_curves(shown(**ENTROPIES), title="", onset_step=None))
    assert set(drawn) == {"teacher entropy", "KL of teacher and student", "mutual information of image and prototype"}
    for label, name in zip(drawn, ENTROPIES, strict=False):
        steps, values = drawn[label]
        assert steps == [0, 10, 20]
        np.testing.assert_allclose(values, np.array(ENTROPIES[name]) / math.log(K))


def test_knn_is_drawn_in_percent_where_it_was_evaluated() -> None:
    records = shown(**ENTROPIES)
    records[0].values["eval/knn_top1"], records[2].values["eval/knn_top1"] = 36.0, 99.0
    figure = explained.trial_curves(records, title="", onset_step=None)
    assert lines(figure)["k-NN of the class (right)"] == ([0, 20], [36.0, 99.0])
    (left, right) = figure.axes
    np.testing.assert_allclose(right.get_ylim(), 100 * np.array(left.get_ylim()))  # one grid serves both


@pytest.mark.parametrize("onset", [0, 10])
def test_the_onset_is_a_line_and_the_verdict_the_title(onset: int) -> None:
    figure = explained.trial_curves(shown(**ENTROPIES), title="uniform from step 10", onset_step=onset)
    assert lines(figure)["onset"] == ([onset, onset], [0, 1])
    assert figure.axes[0].get_title(loc="left") == "uniform from step 10"
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "onset"


def test_without_a_collapse_there_is_no_line() -> None:
    assert "onset" not in lines(explained.trial_curves(shown(**ENTROPIES), title="", onset_step=None))


def test_a_loss_alone_is_drawn_over_ln_k_if_that_is_known() -> None:
    loss = [math.log(K)] * 3
    of_k = explained.trial_curves(
        shown(train__loss=loss, targets__prototypes_number=[256.0] * 3), title="", onset_step=None, unit="epoch"
    )
    assert lines(of_k) == {"loss": ([0, 10, 20], pytest.approx([1.0] * 3))}
    assert (of_k.axes[0].get_xlabel(), of_k.axes[0].get_ylabel()) == ("epoch", "fraction of ln 256")
    assert of_k.axes[0].get_ylim()[1] > 1.01  # a loss of ln K is not on the edge
    plain = explained.trial_curves(shown(train__loss=loss), title="", onset_step=None)
    assert lines(plain)["loss"][1] == loss


def test_outputs_that_are_no_distributions_have_their_std_drawn() -> None:
    drawn = lines(
        explained.trial_curves(shown(train__loss=[1.0, 0.5], features__output_std=[0.7, 0.1]), title="", onset_step=10)
    )
    assert drawn["std of outputs"] == ([0, 10], [0.7, 0.1])


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    figure = explained.trial_curves(shown(train__loss=[9.0, math.nan, 8.0]), title="", onset_step=10)
    np.testing.assert_array_equal(lines(figure)["loss"][1], [9.0, math.nan, 8.0])
    assert figures.render(figure, "png")


def test_a_single_record_and_none_at_all_have_a_picture() -> None:
    assert figures.render(explained.trial_curves(shown(train__loss=[9.0]), title="", onset_step=None), "png")
    assert figures.render(explained.trial_curves([], title="", onset_step=None), "png")


def test_the_same_records_give_the_same_bytes() -> None:
    first, second = (
        figures.render(explained.trial_curves(shown(**ENTROPIES), title="uniform", onset_step=10), "png")
        for _ in range(2)
    )
    assert first == second
