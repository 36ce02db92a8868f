import pytest
import torch
from torch import nn

from dino_lab.core.networks.head import BottleneckHeadSettings, Head, MLPHeadSettings, MLPPredictor
from dino_lab.core.networks.network import Network

LINEAR = MLPHeadSettings(out_dim=5, layers_number=1)
WITH_NORM = MLPHeadSettings(out_dim=5, hidden_dim=8)
BOTTLENECK = BottleneckHeadSettings(out_dim=5, hidden_dim=8, bottleneck_dim=4)


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


def network(head: Head, predictor: nn.Module | None = None) -> tuple[Network, Mean]:
    backbone = Mean()
    return Network(backbone, head, predictor), backbone  # type: ignore[arg-type]


def test_crops_of_one_size_go_together_and_come_back_in_order() -> None:
    head = LINEAR.build(3)
    model, backbone = network(head)
    logits, features = model([crops(range(2), 8), crops(range(2, 5), 4)])
    assert backbone.calls == [(8, 3, 8, 8), (12, 3, 4, 4)]
    assert logits.shape == (5, 4, 5)
    assert features[:, :, 0].tolist() == [[10.0 * v + b for b in range(4)] for v in range(5)]
    torch.testing.assert_close(logits, head(features))


def test_a_group_without_crops_is_passed_over() -> None:
    model, backbone = network(LINEAR.build(3))
    logits, _ = model([crops(range(2), 8), torch.zeros(0, 4, 3, 4, 4)])
    assert backbone.calls == [(8, 3, 8, 8)]
    assert logits.shape == (2, 4, 5)


def test_batch_norm_in_a_head_sees_all_crops_at_once() -> None:
    torch.manual_seed(0)
    head = WITH_NORM.build(3)
    model, _ = network(head)
    logits, features = model([crops(range(2), 8), crops(range(2, 5), 4)])
    assert torch.equal(logits.flatten(0, 1), head(features.flatten(0, 1)))
    apart = torch.cat([head(features[:2].flatten(0, 1)), head(features[2:].flatten(0, 1))])
    assert (logits.flatten(0, 1) - apart).abs().max() > 0.1


@pytest.mark.parametrize("settings", [WITH_NORM, BOTTLENECK], ids=["mlp", "l2_bottleneck"])
def test_a_predictor_stands_between_the_parts_of_the_head(settings: MLPHeadSettings | BottleneckHeadSettings) -> None:
    torch.manual_seed(0)
    head = settings.build(3)
    predictor = MLPPredictor(hidden_dim=8).build(head.projected_dim)
    groups = [crops(range(2), 8), crops(range(2, 5), 4)]
    model, _ = network(head, predictor)
    logits, features = model(groups)
    predicted = predictor(head.project(features.flatten(0, 1)))
    assert torch.equal(logits.flatten(0, 1), head.logits(predicted))
    without, same_features = network(head)[0](groups)
    assert torch.equal(features, same_features)
    assert (logits - without).abs().max() > 0.01


def test_logits_behind_a_predictor_are_still_cosines() -> None:
    torch.manual_seed(0)
    head = BOTTLENECK.build(3)
    predictor = MLPPredictor(hidden_dim=8, batch_norm=False).build(head.projected_dim)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.mul_(100)
    logits, _ = network(head, predictor)[0]([crops(range(2), 8)])
    assert logits.abs().max() <= 1 + 1e-6
