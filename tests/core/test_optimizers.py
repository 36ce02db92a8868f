import math

import pytest
import torch
from torch import nn

from dino_lab.core.networks.head import Head
from dino_lab.core.optimizers import AdamW, clip_each, parameter_groups, set_schedule

HEAD = Head(out_dim=8, hidden_dim=12, bottleneck_dim=6)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"norm": nn.LayerNorm(6), "conv": nn.Conv2d(3, 4, 2), "head": HEAD.build(6)})


def with_gradients(scale: float = 1.0) -> list[nn.Parameter]:
    parameters = list(network().parameters())
    for i, parameter in enumerate(parameters):
        if parameter.requires_grad and i != 2:  # one has none
            parameter.grad = scale * 10.0 ** (i % 4 - 2) * torch.randn_like(parameter)
    return parameters


@pytest.mark.parametrize("clip_grad", [0.1, 1.0, 3.0])
def test_each_gradient_is_clipped_by_its_own_norm_as_in_the_reference(clip_grad: float) -> None:
    ours, theirs = with_gradients(), with_gradients()
    torch.manual_seed(1)
    for a, b in zip(ours, theirs, strict=True):
        if a.grad is not None:
            b.grad = a.grad.clone()
    clip_each(ours, clip_grad=clip_grad)
    clipped = 0
    for a, b in zip(ours, theirs, strict=True):
        if b.grad is None:
            assert a.grad is None
            continue
        coefficient = clip_grad / (b.grad.norm(2) + 1e-6)
        if coefficient < 1:
            b.grad.mul_(coefficient)
            clipped += 1
        torch.testing.assert_close(a.grad, b.grad)
    assert 0 < clipped < len(ours)


def test_clip_0_only_measures() -> None:
    parameters = with_gradients()
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    clip_each(parameters, clip_grad=0.0)
    assert all(a is None or torch.equal(a, p.grad) for a, p in zip(before, parameters, strict=True))


@pytest.mark.parametrize("clip_grad", [0.0, 0.1])
def test_the_norm_is_that_of_all_gradients_before_clipping(clip_grad: float) -> None:
    parameters = with_gradients()
    squares = sum(float(p.grad.double().pow(2).sum()) for p in parameters if p.grad is not None)
    assert float(clip_each(parameters, clip_grad=clip_grad)) == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_biases_and_one_dimensional_parameters_have_no_weight_decay() -> None:
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model))
    layers = [f"head.mlp.{i}" for i in (0, 2, 4)]
    assert decayed == ["conv.weight", *[f"{layer}.weight" for layer in layers], "head.last_layer.weight_v"]
    assert spared == ["norm.weight", "norm.bias", "conv.bias", *[f"{layer}.bias" for layer in layers]]


def test_the_schedule_gives_weight_decay_to_the_first_group_alone() -> None:
    optimizer = AdamW().build(network())
    set_schedule(optimizer, lr=0.1, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.3), (0.1, 0.0)]


def test_steps_are_those_of_torchs_adamw_with_its_defaults() -> None:
    ours, theirs = nn.Linear(3, 3), nn.Linear(3, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = AdamW().build(ours)
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.2}, {"params": [theirs.bias], "weight_decay": 0.0}], lr=0.01
    )
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        set_schedule(optimizer, lr=0.01, weight_decay=0.2)
        for model, adamw in ((ours, optimizer), (theirs, reference)):
            adamw.zero_grad()
            model(x).pow(2).sum().backward()
            adamw.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_the_learning_rate_is_scaled_by_the_batch_and_its_end_is_not() -> None:
    settings = AdamW(lr=0.001, min_lr=1e-5, warmup_epochs=1.5)
    values = [settings.lr_at(step, steps=100, steps_per_epoch=10, batch_size=64) for step in range(101)]
    assert values[0] == 0
    assert values[14] == pytest.approx(0.001 * 64 / 256)
    assert max(values) == pytest.approx(0.001 * 64 / 256)
    assert values[100] == pytest.approx(1e-5)


def test_weight_decay_rises_from_its_start_to_its_end() -> None:
    settings = AdamW(weight_decay=0.04, weight_decay_end=0.4)
    assert settings.weight_decay_at(0, steps=100) == pytest.approx(0.04)
    assert settings.weight_decay_at(50, steps=100) == pytest.approx(0.22)
    assert settings.weight_decay_at(100, steps=100) == pytest.approx(0.4)


@pytest.mark.parametrize(("epochs", "held"), [(0.0, 0), (0.25, 3), (1.0, 10), (2.0, 20)])
def test_the_last_layer_is_held_for_its_epochs(epochs: float, held: int) -> None:
    settings = AdamW(freeze_last_layer_epochs=epochs)
    assert sum(settings.holds_last_layer(step, steps_per_epoch=10) for step in range(100)) == held
    assert not settings.holds_last_layer(held, steps_per_epoch=10)
