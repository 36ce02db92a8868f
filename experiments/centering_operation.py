"""Centring, softmax over the batch or Sinkhorn-Knopp: which keeps the teacher from collapse, and with which teacher?

Expect: with a momentum teacher all three do alike; without one centring collapses, and the other two, which even out
each batch, do not (paper, Table 15).

Command: dino-lab run centering_operation
Cost: 18 trials on shapes_cpu, about 9 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

TEACHERS = {"yes": {}, "no": {"method.teacher.kind": "student_copy"}}
OPERATIONS = ("centering", "softmax_batch", "sinkhorn")

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "operation",
            {
                f"{operation},momentum={momentum}": {"method.operation.kind": operation, **changes}
                for momentum, changes in TEACHERS.items()
                for operation in OPERATIONS
            },
        )
    ],
    seeds=[0, 1, 2],
    published="centering_operation",
)
