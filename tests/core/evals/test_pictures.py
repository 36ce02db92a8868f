import torch

from dino_lab.core.evals.pictures import heads

GREEN, BLACK, WHITE = [0, 255, 0], [0, 0, 0], [255, 255, 255]


def drawn(attention: list[list[float]]) -> torch.Tensor:
    """One gray image of 4 pixels and its heads, each with 2 x 2 patches."""
    images = torch.full((1, 4, 4, 3), 90, dtype=torch.uint8)
    return heads(images, torch.tensor([attention]))


def test_an_image_stands_beside_a_tile_for_each_of_its_heads() -> None:
    picture = drawn([[0.7, 0.1, 0.1, 0.1]] * 3)
    assert picture.shape == (96, 4 * 96 + 3 * 4, 3)
    assert picture.dtype == torch.uint8
    assert (picture[:, :96] == 90).all()
    assert (picture[:, 96:100] == 255).all()
    assert torch.equal(picture[:, 100:196], picture[:, 200:296])


def test_images_stand_below_one_another() -> None:
    images = torch.stack([torch.full((4, 4, 3), 10), torch.full((4, 4, 3), 20)]).to(torch.uint8)
    picture = heads(images, torch.full((2, 1, 4), 0.25))
    assert picture.shape == (2 * 96 + 4, 2 * 96 + 4, 3)
    assert (picture[:96, :96] == 10).all()
    assert (picture[96:100] == 255).all()
    assert (picture[100:, :96] == 20).all()


def test_the_largest_share_is_white_none_is_black_and_a_border_runs_around_what_holds_60_percent() -> None:
    tile = drawn([[0.7, 0.0, 0.3, 0.0]])[:, 100:]
    assert tile[24, 24].tolist() == WHITE
    assert tile[24, 72].tolist() == BLACK
    assert tile[72, 24].tolist() == [255, int(255 * (3 * 0.3 / 0.7 - 1)), 0]
    # The first patch alone, from outside the picture to its neighbours.
    for place in ((0, 20), (20, 0), (47, 20), (20, 47), (0, 0), (47, 47)):
        assert tile[place].tolist() == GREEN
    assert (tile[48:] != torch.tensor(GREEN)).any(dim=-1).all()


def test_heads_are_scaled_each_by_its_own_largest() -> None:
    once, twice = drawn([[0.4, 0.2, 0.2, 0.2]]), drawn([[0.8, 0.4, 0.4, 0.4]])
    assert torch.equal(once, twice)
