import torch
from torch import nn

from dino_lab.core.networks.network import Network


class Mean(nn.Module):
    """A backbone whose feature is the mean of a channel: it tells which crop it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(images.shape))
        return images.mean(dim=(2, 3))


def crops(views: range, size: int) -> torch.Tensor:
    """Crop v of image b is 10 v + b throughout."""
    values = torch.tensor([[10.0 * v + b for b in range(4)] for v in views]).reshape(len(views), 4, 1, 1, 1)
    return values.expand(-1, -1, 3, size, size)


def test_crops_of_one_size_go_together_and_come_back_in_order() -> None:
    backbone = Mean()
    head = nn.Linear(3, 5)
    logits, features = Network(backbone, head)([crops(range(2), 8), crops(range(2, 5), 4)])  # type: ignore[arg-type]
    assert backbone.calls == [(8, 3, 8, 8), (12, 3, 4, 4)]
    assert logits.shape == (5, 4, 5)
    assert features[:, :, 0].tolist() == [[10.0 * v + b for b in range(4)] for v in range(5)]
    assert torch.equal(logits, head(features))


def test_a_group_without_crops_is_passed_over() -> None:
    backbone = Mean()
    logits, _ = Network(backbone, nn.Linear(3, 5))([crops(range(2), 8), torch.zeros(0, 4, 3, 4, 4)])  # type: ignore[arg-type]
    assert backbone.calls == [(8, 3, 8, 8)]
    assert logits.shape == (2, 4, 5)
