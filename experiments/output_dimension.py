"""How many prototypes does the head need?

Expect: more are better up to many times the number of classes, then nothing is gained (paper, Appendix C).

Command: dino-lab run output_dimension
Cost: 12 trials on shapes_cpu, about 7 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis.over("method.head.out_dim", [256, 64, 1024, 4096])],
    seeds=[0, 1, 2],
    published="output_dimension",
)
