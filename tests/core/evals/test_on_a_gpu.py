"""Evaluations of features that lie on a GPU, beside the same on the processor."""

import pytest
import torch

from dino_lab.core.evals.knn import KNN
from dino_lab.core.evals.linear import LinearProbe
from dino_lab.core.evals.retrieval import mean_average_precision


@pytest.mark.gpu
def test_evaluations_on_a_gpu_are_those_of_the_processor() -> None:
    random = torch.Generator().manual_seed(0)
    labels, truth = torch.arange(2000) % 20, torch.arange(500) % 20
    middles = torch.randn(20, 64, generator=random)
    bank = middles[labels] + 2 * torch.randn(2000, 64, generator=random)
    queries = middles[truth] + 2 * torch.randn(500, 64, generator=random)
    here = (bank, labels, queries, truth)
    there = tuple(each.cuda() for each in here)
    assert KNN().top1(*there) == pytest.approx(KNN().top1(*here), abs=0.4)
    probe = LinearProbe(epochs=10)
    (top1, rate), (expected, chosen) = probe.top1(*there, seed=0), probe.top1(*here, seed=0)
    assert rate == chosen
    assert top1 == pytest.approx(expected, abs=0.4)
    assert mean_average_precision(queries.cuda(), truth.cuda(), bank.cuda(), labels.cuda()) == pytest.approx(
        mean_average_precision(queries, truth, bank, labels), abs=0.01
    )
