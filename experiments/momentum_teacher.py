"""How slowly must the teacher follow the student?

Expect: a copy of the student (0) collapses, a slow teacher (0.996 and up) works on ImageNet (paper, Section 5.2);
a short run needs a faster one, since it has too few steps to catch up.

Command: dino-lab run momentum_teacher
Cost: 18 trials on shapes_cpu, about 12 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.one_at_a_time(
    axes=[Axis.over("teacher.momentum_teacher", [0.0, 0.9, 0.99, 0.996, 1.0])], seeds=[0, 1, 2]
)
