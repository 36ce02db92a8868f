"""Does DINO need large batches?

Expect: it works with small ones, a little worse, the learning rate scaled with the batch (paper, Table 9, without
multi-crop). At equal epochs a larger batch has fewer steps, and at the scale of shapes_cpu steps are what is short:
expect the opposite there. Each level is a multiple of the baseline's batch, 512 in the paper's vanilla recipe.

Command: dino-lab run batch_size
Cost: 12 trials on shapes_cpu, about 5 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis
from experiments.arms import NO_MULTICROP

ABLATION = Ablation.grid(
    axes=[Axis.times("batch_size", {"x1": 1.0, "x1/4": 0.25, "x1/2": 0.5, "x2": 2.0})],
    seeds=[0, 1, 2],
    published="batch_size",
    fixed=NO_MULTICROP,
    paper_rows={"x1": "512", "x1/4": "128", "x1/2": "256", "x2": "1024"},
)
