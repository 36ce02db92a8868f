import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dino_lab.core.networks.head import BottleneckHeadSettings
from dino_lab.core.optimizers import (
    LARS,
    SGD,
    AdamW,
    OptimizerSettings,
    clip_all,
    clip_each,
    parameter_groups,
    set_schedule,
)
from dino_lab.core.schedules import Now

HEAD = BottleneckHeadSettings(out_dim=8, hidden_dim=12, bottleneck_dim=6)
ALL = [AdamW(), SGD(), LARS()]
every_optimizer = pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.kind)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"norm": nn.LayerNorm(6), "conv": nn.Conv2d(3, 4, 2), "head": HEAD.build(6)})


def with_gradients(scale: float = 1.0) -> list[nn.Parameter]:
    parameters = list(network().parameters())
    for i, parameter in enumerate(parameters):
        if parameter.requires_grad and i != 2:  # one has none
            parameter.grad = scale * 10.0 ** (i % 4 - 2) * torch.randn_like(parameter)
    return parameters


def gradients(parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """Copies."""
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]


def norm_of_all(parameters: list[nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in parameters if p.grad is not None))


def now(step: int) -> Now:
    return Now(step, steps=100, steps_per_epoch=10, measured=False)


# --------------------------------------------------------------------------------------------------- clipping


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


@pytest.mark.parametrize("clip_grad", [0.1, 1.0, 3.0])
def test_all_gradients_are_clipped_together_by_the_norm_of_all(clip_grad: float) -> None:
    ours = with_gradients()
    before, factor = gradients(ours), clip_grad / (norm_of_all(ours) + 1e-6)
    assert factor < 1
    clip_all(iter(ours), clip_grad=clip_grad)
    for a, b in zip(ours, before, strict=True):
        torch.testing.assert_close(a.grad, None if b is None else b * factor)
    assert norm_of_all(ours) == pytest.approx(clip_grad, rel=1e-4)


@pytest.mark.parametrize("clip_grad", [0.1, 3.0, 1e6])
def test_clipping_all_is_torchs_clip_grad_norm(clip_grad: float) -> None:
    ours, theirs = with_gradients(), with_gradients()
    for a, b in zip(ours, gradients(theirs), strict=True):
        a.grad = b
    norms = clip_all(iter(ours), clip_grad=clip_grad), nn.utils.clip_grad_norm_(iter(theirs), clip_grad)
    assert torch.equal(*norms)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


@pytest.mark.parametrize("clip", [clip_each, clip_all])
def test_gradients_shorter_than_the_bound_are_left_alone(clip: Callable[..., Tensor]) -> None:
    parameters = with_gradients()
    before = gradients(parameters)
    clip(iter(parameters), clip_grad=norm_of_all(parameters) * 1.01)
    assert all(a is None or torch.equal(a, p.grad) for a, p in zip(before, parameters, strict=True))


@pytest.mark.parametrize("clip", [clip_each, clip_all])
def test_clip_0_only_measures(clip: Callable[..., Tensor]) -> None:
    parameters = with_gradients()
    before = gradients(parameters)
    clip(iter(parameters), clip_grad=0.0)
    assert all(a is None or torch.equal(a, p.grad) for a, p in zip(before, parameters, strict=True))


@pytest.mark.parametrize("clip", [clip_each, clip_all])
@pytest.mark.parametrize("clip_grad", [0.0, 0.1])
def test_the_norm_is_that_of_all_gradients_before_clipping(clip: Callable[..., Tensor], clip_grad: float) -> None:
    parameters = with_gradients()
    before = norm_of_all(parameters)
    assert float(clip(iter(parameters), clip_grad=clip_grad)) == pytest.approx(before, rel=1e-5)


@every_optimizer
@pytest.mark.parametrize("clip_grad", [0.0, 0.1])
def test_the_knob_says_whether_each_gradient_is_clipped_or_all(settings: OptimizerSettings, clip_grad: float) -> None:
    found = []
    for clip_over, clip in (("each", clip_each), ("all", clip_all)):
        ours, theirs = with_gradients(), with_gradients()
        for a, b in zip(ours, gradients(theirs), strict=True):
            a.grad = b
        knobs = {"clip_over": clip_over, "clip_grad": clip_grad}
        assert torch.equal(settings.but(knobs).clip(iter(ours)), clip(iter(theirs), clip_grad=clip_grad))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
        found.append(norm_of_all(ours))
    assert (found[0] > 2 * found[1]) is (clip_grad > 0)


def test_each_gradient_is_clipped_unless_the_knob_says_otherwise() -> None:
    assert all(settings.clip_over == "each" for settings in ALL)


# ----------------------------------------------------------------------------------------------------- groups


def test_biases_and_one_dimensional_parameters_have_no_weight_decay() -> None:
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model))
    layers = [f"head.mlp.{i}" for i in (0, 2, 4)]
    assert decayed == ["conv.weight", *[f"{layer}.weight" for layer in layers], "head.last_layer.weight_v"]
    assert spared == ["norm.weight", "norm.bias", "conv.bias", *[f"{layer}.bias" for layer in layers]]


@every_optimizer
def test_the_schedule_gives_weight_decay_to_the_first_group_alone(settings: OptimizerSettings) -> None:
    optimizer = settings.build(network())
    set_schedule(optimizer, lr=0.1, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.3), (0.1, 0.0)]


@every_optimizer
def test_an_optimizer_moves_all_that_has_a_gradient_and_nothing_before_its_schedule(
    settings: OptimizerSettings,
) -> None:
    model = network()
    optimizer = settings.build(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for moved in (False, True):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) is not (moved and parameter.requires_grad)
        set_schedule(optimizer, lr=0.1, weight_decay=0.3)


# ------------------------------------------------------------------------------------------------------ steps

STEPS = [(0.1, 0.0), (0.1, 0.2), (0.05, 0.4), (0.2, 0.4), (0.01, 0.1)]
"""Learning rate and weight decay of each step."""
EPS = 1e-8
"""timm adds it to the divisor of LARS."""


def models() -> tuple[nn.Sequential, nn.Sequential]:
    """The same network twice, in float64; nothing is zero by its start."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        found.append(model)
    return found[0], found[1]


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    model.zero_grad()
    model(x).pow(2).mean().backward()


def groups(model: nn.Sequential) -> list[dict[str, object]]:
    """Written out, with weight decay in the first group alone."""
    return [
        {"params": [model[0].weight, model[3].weight]},
        {"params": [model[0].bias, model[1].weight, model[1].bias, model[3].bias], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (AdamW(), lambda model: torch.optim.AdamW(groups(model))),
        (SGD(), lambda model: torch.optim.SGD(groups(model), momentum=0.9)),
        (SGD(momentum=0.5), lambda model: torch.optim.SGD(groups(model), momentum=0.5)),
        (SGD(momentum=0.0), lambda model: torch.optim.SGD(groups(model))),
    ],
    ids=["adamw", "sgd", "sgd with momentum 0.5", "sgd without momentum"],
)
def test_steps_are_those_of_torchs_optimizer(
    settings: OptimizerSettings, reference: Callable[[nn.Sequential], torch.optim.Optimizer]
) -> None:
    ours, theirs = models()
    optimizer, torchs = settings.build(ours), reference(theirs)
    for step, (lr, weight_decay) in enumerate(STEPS):
        set_schedule(optimizer, lr=lr, weight_decay=weight_decay)
        for group in torchs.param_groups:
            group["lr"] = lr
        torchs.param_groups[0]["weight_decay"] = weight_decay
        for model, each in ((ours, optimizer), (theirs, torchs)):
            backward(model, step)
            each.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_of_sgd_are_those_of_a_plain_loop(momentum: float) -> None:
    """v = momentum v + gradient + weight_decay w;  w = w - lr v."""
    ours, theirs = models()
    optimizer = SGD(momentum=momentum).build(ours)
    velocities = [torch.zeros_like(w) for w in theirs.parameters()]
    for step, (lr, weight_decay) in enumerate(STEPS):
        set_schedule(optimizer, lr=lr, weight_decay=weight_decay)
        for model in (ours, theirs):
            backward(model, step)
        optimizer.step()
        for w, v, new in zip(theirs.parameters(), velocities, ours.parameters(), strict=True):
            decay = weight_decay if w.ndim > 1 else 0.0
            v.copy_(momentum * v + w.grad + decay * w.detach())
            w.data -= lr * v
            torch.testing.assert_close(new, w)


def length(vector: Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector.detach().flatten()))


@pytest.mark.parametrize("trust_coefficient", [0.001, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_of_lars_are_those_of_the_article(trust_coefficient: float, momentum: float, weight_decay: float) -> None:
    """Algorithm 1, with the learning rate in the velocity, layer by layer; one-dimensional parameters as in SGD."""
    lr = 0.5
    ours, theirs = models()
    optimizer = LARS(momentum=momentum, trust_coefficient=trust_coefficient).build(ours)
    velocities = [torch.zeros_like(w) for w in theirs.parameters()]
    for step in range(5):
        set_schedule(optimizer, lr=lr, weight_decay=weight_decay)
        for model in (ours, theirs):
            backward(model, step)
        optimizer.step()
        for w, v, new in zip(theirs.parameters(), velocities, ours.parameters(), strict=True):
            local_lr, decay = 1.0, 0.0
            if w.ndim > 1:
                decay = weight_decay
                local_lr = trust_coefficient * length(w) / (length(w.grad) + decay * length(w) + EPS)
            v.copy_(momentum * v + lr * local_lr * (w.grad + decay * w.detach()))
            w.data -= v
            torch.testing.assert_close(new, w)


def test_the_learning_rate_of_a_lars_step_is_that_of_now_for_all_gradients_that_it_remembers() -> None:
    """As in torch's SGD and in the reference; in the article a gradient keeps the learning rate of its own step."""
    ours, theirs = models()
    optimizer = LARS(trust_coefficient=0.1).build(ours)
    velocities = [torch.zeros_like(w) for w in theirs.parameters()]
    for step, (lr, weight_decay) in enumerate(STEPS):
        set_schedule(optimizer, lr=lr, weight_decay=weight_decay)
        for model in (ours, theirs):
            backward(model, step)
        optimizer.step()
        for w, v, new in zip(theirs.parameters(), velocities, ours.parameters(), strict=True):
            update = w.grad
            if w.ndim > 1:
                local_lr = 0.1 * length(w) / (length(w.grad) + weight_decay * length(w) + EPS)
                update = local_lr * (w.grad + weight_decay * w.detach())
            v.copy_(0.9 * v + update)
            w.data -= lr * v
            torch.testing.assert_close(new, w)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_length_of_a_lars_step_follows_the_weight_and_not_the_gradient(scale: float) -> None:
    model = nn.Linear(4, 3).double()
    optimizer = LARS(trust_coefficient=0.02).build(model)
    set_schedule(optimizer, lr=0.5, weight_decay=0.0)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = scale * torch.ones_like(parameter)
    optimizer.step()
    assert length(model.weight - weight) == pytest.approx(0.5 * 0.02 * length(weight), rel=1e-4)
    torch.testing.assert_close(model.bias, bias - 0.5 * scale)


@every_optimizer
def test_an_optimizer_resumed_after_two_steps_goes_on_to_the_same_bits(settings: OptimizerSettings) -> None:
    whole, killed = models()
    straight, optimizer = settings.build(whole), settings.build(killed)
    for step, (lr, weight_decay) in enumerate(STEPS):
        if step == 2:
            state, resumed = optimizer.state_dict(), models()[0]
            resumed.load_state_dict(killed.state_dict())
            killed, optimizer = resumed, settings.build(resumed)
            optimizer.load_state_dict(state)
        for model, each in ((whole, straight), (killed, optimizer)):
            set_schedule(each, lr=lr, weight_decay=weight_decay)
            backward(model, step)
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), killed.parameters(), strict=True))


# -------------------------------------------------------------------------------------------------- schedules


@every_optimizer
def test_the_learning_rate_is_scaled_by_the_batch_and_its_end_is_not(settings: OptimizerSettings) -> None:
    settings = settings.but({"lr": 0.001, "min_lr": 1e-5, "warmup_epochs": 1.5})
    values = [settings.lr_at(now(step), batch_size=64) for step in range(101)]
    assert values[0] == 0
    assert values[14] == pytest.approx(0.001 * 64 / 256)
    assert max(values) == pytest.approx(0.001 * 64 / 256)
    assert values[100] == pytest.approx(1e-5)


@every_optimizer
@pytest.mark.parametrize("batch_size", [1, 64, 256, 1024])
def test_the_scale_of_the_learning_rate_is_linear_in_the_batch_or_its_root_or_none(
    settings: OptimizerSettings, batch_size: int
) -> None:
    assert settings.lr_scaling == "linear"
    factors = {"linear": batch_size / 256, "sqrt": (batch_size / 256) ** 0.5, "none": 1.0}
    for lr_scaling, factor in factors.items():
        scaled = settings.but({"lr_scaling": lr_scaling, "lr": 0.001, "min_lr": 1e-5, "warmup_epochs": 2.0})
        values = [scaled.lr_at(now(step), batch_size=batch_size) for step in range(101)]
        assert values[:20] == pytest.approx([0.001 * factor * step / 19 for step in range(20)])
        assert values[60] == pytest.approx((0.001 * factor + 1e-5) / 2)
        assert values[100] == pytest.approx(1e-5)


@every_optimizer
def test_weight_decay_rises_from_its_start_to_its_end(settings: OptimizerSettings) -> None:
    settings = settings.but({"weight_decay": 0.04, "weight_decay_end": 0.4})
    assert settings.weight_decay_at(now(0)) == pytest.approx(0.04)
    assert settings.weight_decay_at(now(50)) == pytest.approx(0.22)
    assert settings.weight_decay_at(now(100)) == pytest.approx(0.4)
