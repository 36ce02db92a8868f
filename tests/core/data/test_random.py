import numpy as np
import pytest
from scipy import stats

from dino_lab.core.data.random import NO_CROP, order, philox, uniform

F = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert tuple(int(word) for word in philox(counter, key)) == words


def test_every_draw_is_the_word_of_its_own_counter() -> None:
    u = uniform(2**33 + 5, 3, np.array([11, 7]), np.array([[0], [9]]), 6)
    for crop_place, crop in enumerate((0, 9)):
        for image_place, image in enumerate((11, 7)):
            words = [int(word) for block in (0, 1) for word in philox((block, crop, image, 3), (5, 2))]
            assert u[crop_place, image_place].tolist() == [word / 2**32 for word in words[:6]]


def test_draws_are_uniform() -> None:
    u = uniform(1, 0, np.arange(20_000), 0, 8)
    assert u.min() >= 0
    assert u.max() < 1
    for draw in range(8):
        assert stats.kstest(u[:, draw], "uniform").pvalue > 1e-3
    # The lower digits too: cells of the unit interval 2^-16 wide, each cut into 64.
    fine = np.floor(u.ravel() * 2**22).astype(np.int64) % 64
    assert stats.chisquare(np.bincount(fine, minlength=64)).pvalue > 1e-3


def test_neighbouring_counters_are_uncorrelated() -> None:
    images = np.arange(40_000)
    base = uniform(1, 0, images, 0, 5)
    first = base[:, 0]
    neighbours = {
        "draw": base[:, 1],
        "block of draws": base[:, 4],
        "image": uniform(1, 0, images + 1, 0, 1)[:, 0],
        "crop": uniform(1, 0, images, 1, 1)[:, 0],
        "epoch": uniform(1, 1, images, 0, 1)[:, 0],
        "seed": uniform(2, 0, images, 0, 1)[:, 0],
        "seed's upper word": uniform(1 + 2**32, 0, images, 0, 1)[:, 0],
        "order of images": uniform(1, 0, images, NO_CROP, 1)[:, 0],
    }
    for name, other in neighbours.items():
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / np.sqrt(len(images)), name


def test_more_draws_leave_the_earlier_ones_as_they_are() -> None:
    images = np.array([5, 2, 8])
    assert np.array_equal(uniform(0, 0, images, 1, 33)[:, :7], uniform(0, 0, images, 1, 7))


def test_order_is_a_permutation_of_its_arguments_alone() -> None:
    first = order(3, 4, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert np.array_equal(first, order(3, 4, 1000))
    assert not np.array_equal(first, order(3, 5, 1000))
    assert not np.array_equal(first, order(4, 4, 1000))


def test_every_order_of_images_is_equally_likely() -> None:
    seen = np.array([order(0, epoch, 4) for epoch in range(4800)])
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
