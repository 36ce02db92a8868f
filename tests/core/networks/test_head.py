import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from dino_lab.core.networks.head import DINOHead, Head

SMALL = Head(out_dim=16, hidden_dim=12, bottleneck_dim=6)


class ReferenceHead(nn.Module):
    """The reference's head: vision_transformer.py, DINOHead, with torch's own weight norm."""

    def __init__(self, in_dim: int, head: Head) -> None:
        super().__init__()
        sizes = [in_dim] + [head.hidden_dim] * (head.layers_number - 1) + [head.bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = weight_norm(nn.Linear(head.bottleneck_dim, head.out_dim, bias=False))
        self.last_layer.weight_g.data.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1, p=2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers_number", [1, 2, 3])
@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_logits_and_gradients_are_the_references(layers_number: int, norm_last_layer: bool) -> None:
    torch.manual_seed(0)
    settings = SMALL.but({"layers_number": layers_number, "norm_last_layer": norm_last_layer})
    ours, theirs = settings.build(8), ReferenceHead(8, settings)
    theirs.load_state_dict(ours.state_dict())
    theirs.last_layer.weight_g.requires_grad_(not norm_last_layer)
    if not norm_last_layer:
        for head in (ours, theirs):
            head.last_layer.weight_g.data.copy_(torch.linspace(0.5, 2, 16)[:, None])
    x, weights = torch.randn(5, 8), torch.randn(5, 16)
    torch.testing.assert_close(ours(x), theirs(x))
    for head in (ours, theirs):
        (head(x) * weights).sum().backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs_by_name[name].grad)
        else:
            assert theirs_by_name[name].grad is None


def test_weights_start_as_the_references() -> None:
    torch.manual_seed(0)
    head = Head(out_dim=64, hidden_dim=256, bottleneck_dim=64).build(128)
    for layer in (head.mlp[0], head.mlp[2], head.mlp[4]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias.abs().max() == 0
    assert torch.equal(head.last_layer.weight_g, torch.ones(64, 1))
    # torch's default for a linear layer: uniform within 1 / sqrt(inputs).
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(1 / math.sqrt(64), rel=0.02)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_the_length_of_prototypes_is_learned_only_if_it_is_not_normed(norm_last_layer: bool) -> None:
    head: DINOHead = SMALL.but({"norm_last_layer": norm_last_layer}).build(8)
    assert head.last_layer.weight_g.requires_grad is not norm_last_layer


def test_logits_are_cosines_while_prototypes_have_length_one() -> None:
    head = SMALL.build(8)
    with torch.no_grad():
        head.last_layer.weight_v.mul_(7)
    assert head(torch.randn(100, 8) * 100).abs().max() <= 1 + 1e-6


def test_entropy_of_uniform_is_ln_k() -> None:
    assert Head(out_dim=65536).entropy_of_uniform == pytest.approx(16 * math.log(2))
