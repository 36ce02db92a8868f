import signal

import pytest
import torch

from dino_lab.core.trial import Trial
from experiments.baselines import BASELINES

torch.set_num_threads(1)
# In the background of a shell SIGINT is ignored, under nohup SIGHUP, and by every process that is started here too:
# tests of Ctrl-C and of a terminal that is closed hang.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def smoke() -> Trial:
    """A whole trial of twelve steps that takes about a second."""
    return BASELINES["smoke"]
