"""How many prototypes does the head need?

Expect: more are better up to many times the number of classes, then nothing is gained (paper, Appendix C). Each level
is a multiple of the baseline's prototypes, 65536 in the paper's.

Command: dino-lab run output_dimension
Cost: 15 trials on shapes_cpu, about 8 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis.times("method.head.out_dim", {"x1": 1.0, "x1/64": 1 / 64, "x1/16": 1 / 16, "x1/4": 0.25, "x4": 4.0})],
    seeds=[0, 1, 2],
    published="output_dimension",
    paper_rows={"x1": "65536", "x1/64": "1024", "x1/16": "4096", "x1/4": "16384", "x4": "262144"},
)
