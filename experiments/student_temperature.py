"""How hot may the student be?

Expect: nothing published, the reference has it at 0.1 and out of reach. The nearer to the teacher's 0.04, the less
sharpening is left: at 0.04 centring stands alone, and that collapses to uniform (paper, Section 5.3).

Command: dino-lab run student_temperature
Cost: 15 trials on shapes_cpu, about 8 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

ABLATION = Ablation.grid(
    axes=[Axis.over("method.loss.student_temp", [0.1, 0.04, 0.07, 0.2, 0.4])],
    seeds=[0, 1, 2],
)
