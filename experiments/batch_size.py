"""Does DINO need large batches?

Expect: it works with small ones, a little worse, the learning rate scaled with the batch (paper, Table 9). At equal
epochs a larger batch has fewer steps, and at this scale steps are what is short: expect the opposite here.

Command: dino-lab run batch_size
Cost: 9 trials on shapes_cpu, about 6 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Like

LEVELS = {f"x{times:g}": {"batch_size": Like("batch_size", times=times)} for times in (1.0, 0.5, 2.0)}

ABLATION = Ablation.grid(axes=[Axis("batch_size", LEVELS)], seeds=[0, 1, 2])
