"""How prototypes are used: closed forms, and the running means against plain loops."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lab.core import records
from dino_lab.core.diagnostics.prototypes import PrototypeUse

K = 16


def one_hot(*chosen: int) -> Tensor:
    """Targets of two crops of as many images each."""
    return F.one_hot(torch.tensor(chosen), K).float().unflatten(0, (2, -1))


def measured(*steps: Tensor) -> dict[str, float]:
    use = PrototypeUse()
    for targets in steps:
        use.see(targets)
        use.end_step()
    return {name: float(value) for name, value in use.measures().items()}


def test_uniform_targets_have_a_marginal_entropy_of_ln_k_and_say_nothing_of_their_image() -> None:
    values = measured(torch.full((2, 8, K), 1 / K))
    assert values[records.MARGINAL_ENTROPY] == pytest.approx(math.log(K))
    assert values[records.MUTUAL_INFORMATION] == pytest.approx(0, abs=1e-6)
    assert values[records.PROTOTYPES_NUMBER] == K


def test_targets_on_one_prototype_have_none_and_use_one() -> None:
    assert measured(one_hot(*[3] * 16)) == {
        records.PROTOTYPES_NUMBER: K,
        records.MARGINAL_ENTROPY: 0,
        records.MUTUAL_INFORMATION: 0,
        records.PROTOTYPES_IN_USE: 1,
        records.PROTOTYPES_PERPLEXITY: 1,
        records.LARGEST_SHARE: 1,
    }


@pytest.mark.parametrize("used", [2, 4, 8])
def test_one_hot_targets_spread_over_n_prototypes_say_ln_n_of_their_image(used: int) -> None:
    values = measured(one_hot(*(i % used for i in range(16))))
    assert values[records.MARGINAL_ENTROPY] == pytest.approx(math.log(used))
    assert values[records.MUTUAL_INFORMATION] == pytest.approx(math.log(used), rel=1e-5)
    assert values[records.PROTOTYPES_IN_USE] == used
    assert values[records.PROTOTYPES_PERPLEXITY] == pytest.approx(used)
    assert values[records.LARGEST_SHARE] == pytest.approx(1 / used)


def test_the_marginal_is_over_crops_as_well_as_images() -> None:
    values = measured(one_hot(*(crop * 8 + i for crop in range(2) for i in range(8))))
    assert values[records.MARGINAL_ENTROPY] == pytest.approx(math.log(16))


def test_mutual_information_is_the_mean_divergence_of_a_target_from_the_mean_target() -> None:
    targets = torch.randn(2, 8, K, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    rows = targets.flatten(0, 1).double().numpy()
    divergences = [(row * np.log(row / rows.mean(axis=0))).sum() for row in rows]
    assert measured(targets)[records.MUTUAL_INFORMATION] == pytest.approx(np.mean(divergences), rel=1e-4)


def test_a_step_with_as_many_targets_as_prototypes_forgets_those_before() -> None:
    assert measured(one_hot(*range(16)), one_hot(*[3] * 16)) == measured(one_hot(*[3] * 16))


def test_fewer_targets_are_a_plain_mean_until_there_are_k_and_a_window_of_k_then() -> None:
    """Four a step of 16 prototypes: a window of four steps."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(2, 2, K, generator=generator).mul(3).softmax(dim=-1) for _ in range(9)]
    target, chosen = np.zeros(K), np.zeros(K)
    for number, step in enumerate(steps, start=1):
        rows = step.flatten(0, 1).double().numpy()
        weight = max(1 / number, 4 / K)
        target = (1 - weight) * target + weight * rows.mean(axis=0)
        chosen = (1 - weight) * chosen + weight * np.bincount(rows.argmax(axis=1), minlength=K) / 4
    values = measured(*steps)
    assert values[records.MARGINAL_ENTROPY] == pytest.approx(-(target * np.log(target)).sum(), rel=1e-5)
    used = chosen[chosen > 0]
    assert values[records.PROTOTYPES_PERPLEXITY] == pytest.approx(math.exp(-(used * np.log(used)).sum()), rel=1e-5)
    assert values[records.LARGEST_SHARE] == pytest.approx(chosen.max(), rel=1e-5)


def test_a_batch_far_smaller_than_k_comes_to_know_all_prototypes_that_are_used() -> None:
    """One batch of two targets would have an entropy of ln 2; a running mean weighs the newest a little more."""
    values = measured(*(one_hot(step % K, (step + 8) % K) for step in range(400)))
    assert values[records.MARGINAL_ENTROPY] == pytest.approx(math.log(K), rel=0.02)
    assert values[records.PROTOTYPES_IN_USE] == K


def test_the_same_target_for_all_images_says_nothing_of_them_however_it_wanders() -> None:
    values = measured(*(one_hot(step % K, step % K) for step in range(50)))
    assert values[records.MUTUAL_INFORMATION] == 0
    assert values[records.MARGINAL_ENTROPY] > 2


def test_a_prototype_that_is_not_chosen_any_more_leaves_use() -> None:
    spread_out = [one_hot(step % K, (step + 8) % K) for step in range(64)]
    values = measured(*spread_out, *[one_hot(3, 3)] * 64)
    assert values[records.PROTOTYPES_IN_USE] == 1
    assert values[records.LARGEST_SHARE] > 0.99


def test_a_step_in_parts_is_the_same_step() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(2, 4, K, generator=generator).softmax(dim=-1) for _ in range(5)]
    use = PrototypeUse()
    for step in steps:
        for part in step.chunk(2, dim=1):
            use.see(part)
        use.end_step()
    assert {name: float(value) for name, value in use.measures().items()} == pytest.approx(measured(*steps), rel=1e-5)


def test_patches_are_targets_like_crops() -> None:
    targets = torch.randn(2, 3, 4, K, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    assert measured(targets) == measured(targets.flatten(1, 2))


def test_a_method_without_targets_measures_nothing() -> None:
    use = PrototypeUse()
    use.end_step()
    assert use.measures() == {}


def test_a_saved_state_goes_on_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(2, 2, K, generator=generator).softmax(dim=-1) for _ in range(6)]
    first = PrototypeUse()
    for step in steps[:3]:
        first.see(step)
        first.end_step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = PrototypeUse()
    second.load_state_dict(torch.load(file, weights_only=True))
    for step in steps[3:]:
        second.see(step)
        second.end_step()
    assert {name: float(value) for name, value in second.measures().items()} == measured(*steps)
