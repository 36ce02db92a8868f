"""Does batch normalisation belong into the head?

Expect: it is a little better without, and then nothing of DINO looks at a whole batch (paper, Appendix C).

Command: dino-lab run head_batchnorm
Cost: 6 trials on shapes_cpu, about 3 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis("batch_norm", {"without": {"method.head.batch_norm": False}, "with": {"method.head.batch_norm": True}})],
    seeds=[0, 1, 2],
    published="head_batchnorm",
)
