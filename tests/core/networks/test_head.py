import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from dino_lab.core.networks.head import (
    Activation,
    BottleneckHead,
    BottleneckHeadSettings,
    MLPHeadSettings,
    MLPPredictor,
    NoPredictor,
    mlp,
)
from dino_lab.core.schedules import Now

SMALL = BottleneckHeadSettings(out_dim=16, hidden_dim=12, bottleneck_dim=6)
SMALL_MLP = MLPHeadSettings(out_dim=16, hidden_dim=12)


def now(step: int) -> Now:
    return Now(step, steps=100, steps_per_epoch=10, measured=False)


# ---------------------------------------------------------------------------------------------- the paper's head


class ReferenceHead(nn.Module):
    """The reference's head: vision_transformer.py, DINOHead, with torch's own weight norm; the activation is free."""

    def __init__(self, in_dim: int, head: BottleneckHeadSettings) -> None:
        super().__init__()
        if head.layers_number == 1:
            self.mlp: nn.Module = nn.Linear(in_dim, head.bottleneck_dim)
        else:
            layers: list[nn.Module] = []
            for before, after in pairwise([in_dim] + [head.hidden_dim] * (head.layers_number - 1)):
                layers.append(nn.Linear(before, after))
                if head.batch_norm:
                    layers.append(nn.BatchNorm1d(after))
                layers.append({"gelu": nn.GELU(), "relu": nn.ReLU()}[head.activation])
            layers.append(nn.Linear(head.hidden_dim, head.bottleneck_dim))
            self.mlp = nn.Sequential(*layers)
        self.last_layer = weight_norm(nn.Linear(head.bottleneck_dim, head.out_dim, bias=False))
        self.last_layer.weight_g.data.fill_(1)
        if head.norm_last_layer:
            self.last_layer.weight_g.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))  # type: ignore[no-any-return]


def pair(settings: BottleneckHeadSettings) -> tuple[BottleneckHead, ReferenceHead, dict[str, str]]:
    """Both heads with the same weights, drawn so that nothing is zero or one by its start; and their names for ours.

    In float64, since the gradient of a bias before batch normalisation is 0 but for rounding.
    """
    torch.manual_seed(0)
    ours, theirs = settings.build(8).double(), ReferenceHead(8, settings).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    one = settings.layers_number == 1  # there the reference has no sequence
    names = {name: name.replace("mlp.0.", "mlp.") if one else name for name in ours.state_dict()}
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    return ours, theirs, names


@pytest.mark.parametrize("layers_number", [1, 2, 3, 4])
@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_logits_gradients_and_running_statistics_are_the_references(
    layers_number: int, norm_last_layer: bool, activation: str, batch_norm: bool
) -> None:
    ours, theirs, names = pair(
        SMALL.but(
            {
                "layers_number": layers_number,
                "norm_last_layer": norm_last_layer,
                "activation": activation,
                "batch_norm": batch_norm,
            }
        )
    )
    x, weights = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 16)
    torch.testing.assert_close(ours(x), theirs(x))
    for head in (ours, theirs):
        (head(x) * weights).sum().backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs_by_name[names[name]].grad)
        else:
            assert theirs_by_name[names[name]].grad is None
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[names[name]])
    assert any(True for _ in ours.buffers()) is (batch_norm and layers_number > 1)
    for head in (ours, theirs):
        head.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_one_layer_is_a_plain_linear_layer() -> None:
    torch.manual_seed(0)
    head = SMALL.but({"layers_number": 1, "batch_norm": True}).build(8)
    (layer,) = head.mlp
    nn.init.normal_(layer.bias)
    x = torch.randn(5, 8)
    torch.testing.assert_close(head.project(x), x @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_weights_start_as_the_references(batch_norm: bool) -> None:
    torch.manual_seed(0)
    head = BottleneckHeadSettings(out_dim=64, hidden_dim=256, bottleneck_dim=64, batch_norm=batch_norm).build(128)
    linears = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert len(linears) == 3
    for layer in linears:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias.abs().max() == 0
    assert torch.equal(head.last_layer.weight_g, torch.ones(64, 1))
    # torch's default for a linear layer: uniform within 1 / sqrt(inputs).
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(1 / math.sqrt(64), rel=0.02)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_the_length_of_prototypes_is_learned_only_if_it_is_not_normed(norm_last_layer: bool) -> None:
    head: BottleneckHead = SMALL.but({"norm_last_layer": norm_last_layer}).build(8)
    assert head.last_layer.weight_g.requires_grad is not norm_last_layer


def test_logits_are_cosines_while_prototypes_have_length_one() -> None:
    head = SMALL.build(8)
    with torch.no_grad():
        head.last_layer.weight_v.mul_(7)
    x = torch.randn(100, 8) * 100
    assert head(x).abs().max() <= 1 + 1e-6
    cosines = F.cosine_similarity(head.project(x)[:, None], head.last_layer.weight_v, dim=-1)
    torch.testing.assert_close(head(x), cosines, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("epochs", "held"), [(0.0, 0), (0.25, 3), (1.0, 10), (2.0, 20)])
def test_the_last_layer_and_nothing_else_is_held_for_its_epochs(epochs: float, held: int) -> None:
    head = SMALL.but({"freeze_last_layer_epochs": epochs}).build(8)
    last = {id(head.last_layer.weight_v), id(head.last_layer.weight_g)}
    found = [{id(parameter) for parameter in head.held(now(step))} for step in range(100)]
    assert found == [last] * held + [set()] * (100 - held)


# ---------------------------------------------------------------------------------------------------- plain MLPs


def plain_mlp(layers: nn.Sequential, x: Tensor, *, activation: str, batch_norm: bool) -> Tensor:
    """In float64, layer by layer, from the weights of the linear layers and of the norms in their order."""
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm1d)]
    assert len(norms) == (len(linears) - 1 if batch_norm else 0)
    x = x.double()
    for i, linear in enumerate(linears):
        x = x @ linear.weight.double().T + linear.bias.double()
        if i == len(linears) - 1:
            break
        if batch_norm:
            x = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt()
            x = x * norms[i].weight.double() + norms[i].bias.double()
        x = x.clamp(min=0) if activation == "relu" else x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x


@pytest.mark.parametrize("layers_number", [1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_an_mlp_head_is_linear_layers_with_norm_and_activation_between_them(
    layers_number: int, activation: str, batch_norm: bool
) -> None:
    torch.manual_seed(0)
    knobs = {"layers_number": layers_number, "activation": activation, "batch_norm": batch_norm}
    head = SMALL_MLP.but(knobs).build(8)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(7, 8)
    theirs = plain_mlp(head.mlp, x, activation=activation, batch_norm=batch_norm)
    assert theirs.shape == (7, 16)
    torch.testing.assert_close(head(x).double(), theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(head.logits(head.project(x)), head(x))


@pytest.mark.parametrize("layers_number", [1, 2, 3])
def test_an_mlp_head_has_its_widths_and_starts_as_torchs_layers(layers_number: int) -> None:
    torch.manual_seed(0)
    head = MLPHeadSettings(out_dim=50, hidden_dim=100, layers_number=layers_number).build(400)
    linears = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    widths = [400] + [100] * (layers_number - 1) + [50]
    assert [(linear.in_features, linear.out_features) for linear in linears] == list(pairwise(widths))
    for linear in linears:  # uniform within 1 / sqrt(inputs)
        assert linear.weight.abs().max().item() == pytest.approx(1 / math.sqrt(linear.in_features), rel=0.02)


@pytest.mark.parametrize("kind", [MLPHeadSettings, MLPPredictor])
def test_an_mlp_may_start_as_the_papers_head(kind: type[MLPHeadSettings | MLPPredictor]) -> None:
    torch.manual_seed(0)
    built = kind(hidden_dim=500, small_start=True).build(300)
    linears = [layer for layer in built.modules() if isinstance(layer, nn.Linear)]
    assert len(linears) == 2
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not linear.bias.any()


def test_an_mlp_head_holds_nothing() -> None:
    assert not any(list(SMALL_MLP.build(8).held(now(step))) for step in range(100))


def copied_into(theirs: nn.Module, ours: nn.Sequential) -> None:
    """lightly has no bias before a norm, which forgets it."""
    state = {name: value for name, value in ours.state_dict().items() if name != "0.bias"}
    theirs.load_state_dict({f"layers.{name}": value for name, value in state.items()})


def test_the_mlp_head_with_two_layers_is_lightlys_projection_of_byol() -> None:
    torch.manual_seed(0)
    ours = SMALL_MLP.build(8)
    theirs = BYOLProjectionHead(8, 12, 16)
    copied_into(theirs, ours.mlp)
    x = torch.randn(7, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_the_predictor_is_lightlys_of_byol() -> None:
    torch.manual_seed(0)
    ours = MLPPredictor(hidden_dim=12).build(6)
    theirs = BYOLPredictionHead(6, 12, 6)
    assert isinstance(ours, nn.Sequential)
    copied_into(theirs, ours)
    x = torch.randn(7, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_predictor_is_an_mlp_of_two_layers_that_keeps_the_dimension(activation: Activation, batch_norm: bool) -> None:
    torch.manual_seed(0)
    predictor = MLPPredictor(hidden_dim=12, activation=activation, batch_norm=batch_norm).build(6)
    assert isinstance(predictor, nn.Sequential)
    x = torch.randn(7, 6)
    theirs = plain_mlp(predictor, x, activation=activation, batch_norm=batch_norm)
    torch.testing.assert_close(predictor(x).double(), theirs, rtol=1e-5, atol=1e-5)
    linears = [layer for layer in predictor if isinstance(layer, nn.Linear)]
    assert [(linear.in_features, linear.out_features) for linear in linears] == [(6, 12), (12, 6)]


def test_no_predictor_is_none() -> None:
    assert NoPredictor().build(6) is None


# ------------------------------------------------------------------------------------------- what all heads have


@pytest.mark.parametrize(("settings", "projected_dim"), [(SMALL, 6), (SMALL_MLP, 16)], ids=["l2_bottleneck", "mlp"])
def test_a_heads_two_parts_make_its_logits_with_a_place_for_a_predictor_between(
    settings: Any, projected_dim: int
) -> None:
    torch.manual_seed(0)
    head = settings.build(8)
    x = torch.randn(5, 8)
    projected = head.project(x)
    assert head.projected_dim == projected.shape[1] == projected_dim
    assert torch.equal(head.logits(projected), head(x))
    assert head(x).shape == (5, settings.out_dim)
    predictor = MLPPredictor(hidden_dim=12).build(head.projected_dim)
    assert head.logits(predictor(projected)).shape == (5, settings.out_dim)


@pytest.mark.parametrize("settings", [SMALL, SMALL_MLP], ids=["l2_bottleneck", "mlp"])
def test_heads_built_under_one_seed_are_the_same(settings: Any) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(copy.deepcopy(settings.build(8).state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_mlp_of_no_hidden_layer_is_a_linear_layer() -> None:
    for batch_norm in (True, False):
        assert [type(layer) for layer in mlp([3, 2], activation="relu", batch_norm=batch_norm, small_start=True)] == [
            nn.Linear
        ]
