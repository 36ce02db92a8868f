import pytest
import torch

from dino_lab.core.trial import Trial
from experiments.baselines import BASELINES

torch.set_num_threads(1)


@pytest.fixture
def smoke() -> Trial:
    """A whole trial of twelve steps that takes about a second."""
    return BASELINES["smoke"]
