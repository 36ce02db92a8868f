import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from dino_lab.core.evals import retrieval
from dino_lab.core.evals.retrieval import Truth, mean_average_precision, revisited


def at_angles(*degrees: float) -> torch.Tensor:
    radians = torch.tensor(degrees) / 180 * math.pi
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


def test_a_ranking_by_hand() -> None:
    """Sought at places 1, 3 and 4 of five: (1 + 2/3 + 3/4) / 3."""
    gallery, labels = at_angles(1, 2, 3, 4, 5), torch.tensor([7, 0, 7, 7, 0])
    found = mean_average_precision(at_angles(0), torch.tensor([7]), 3 * gallery, labels)
    assert found == pytest.approx(100 * (1 + 2 / 3 + 3 / 4) / 3)


def test_it_is_scikit_learns_average_precision_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(30, 8, generator=generator), torch.randn(200, 8, generator=generator)
    truth, labels = torch.randint(0, 5, (30,), generator=generator), torch.randint(0, 5, (200,), generator=generator)
    similarities = (F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T).numpy()
    expected = np.mean(
        [
            average_precision_score((labels == label).numpy(), row)
            for label, row in zip(truth, similarities, strict=True)
        ]
    )
    for size in (7, 30, 100):
        monkeypatch.setattr(retrieval, "_QUERIES", size)
        assert mean_average_precision(queries, truth, gallery, labels) == pytest.approx(100 * expected, rel=1e-6)


def test_separable_features_are_found_perfectly() -> None:
    gallery, labels = at_angles(0, 1, 90, 91), torch.tensor([0, 0, 1, 1])
    assert mean_average_precision(at_angles(0.4, 90.4), torch.tensor([0, 1]), gallery, labels) == pytest.approx(100)


def test_a_query_of_which_there_is_no_image_is_left_out() -> None:
    gallery, labels = at_angles(0, 50), torch.tensor([0, 1])
    assert mean_average_precision(at_angles(0, 0), torch.tensor([0, 9]), gallery, labels) == pytest.approx(100)
    assert math.isnan(mean_average_precision(at_angles(0), torch.tensor([9]), gallery, labels))


# ---------------------------------------------------------------------------------- revisited Oxford and Paris


def trapezoids(ranks: list[int]) -> float:
    """The protocol's average precision: each of the sought adds the mean of the precisions before and at it."""
    total = 0.0
    for j, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else j / rank
        total += (before + (j + 1) / (rank + 1)) / 2 / len(ranks)
    return total


SIMILARITIES = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
TRUTH = [Truth(easy=[1], hard=[4], junk=[0])]


@pytest.mark.parametrize(
    ("protocol", "ranks"),
    [
        ("easy", [0]),  # junk before it is out
        ("hard", [2]),  # junk and the easy one are out; 2 and 3 are before it
        ("medium", [0, 3]),
    ],
)
def test_junk_and_what_is_not_sought_is_taken_out_of_the_ranking(protocol, ranks: list[int]) -> None:
    assert revisited(SIMILARITIES, TRUTH, protocol=protocol) == pytest.approx(100 * trapezoids(ranks))


def test_junk_between_those_sought_does_not_count() -> None:
    truth = [Truth(easy=[0, 2], hard=[], junk=[1])]
    assert revisited(SIMILARITIES, truth, protocol="easy") == pytest.approx(100)
    without = [Truth(easy=[0, 2], hard=[], junk=[])]
    assert revisited(SIMILARITIES, without, protocol="easy") == pytest.approx(100 * trapezoids([0, 2]))


def test_a_query_with_nothing_sought_is_left_out() -> None:
    twice = SIMILARITIES.expand(2, -1)
    truth = [*TRUTH, Truth(easy=[1], hard=[], junk=[])]
    assert revisited(twice, truth, protocol="hard") == revisited(SIMILARITIES, TRUTH, protocol="hard")
    assert math.isnan(revisited(SIMILARITIES, [Truth(easy=[], hard=[], junk=[0])], protocol="medium"))
