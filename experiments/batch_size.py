"""Does DINO need large batches?

Expect: it works with small ones, a little worse, the learning rate scaled with the batch (paper, Table 9). At equal
epochs a larger batch has fewer steps, and at this scale steps are what is short: expect the opposite here.

Command: dino-lab run batch_size
Cost: 9 trials on shapes_cpu, about 6 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(axes=[Axis.over("batch_size", [16, 8, 32])], seeds=[0, 1, 2], published="batch_size")
