"""Which teacher does a student without labels need?

Expect: the student's own copy and its previous iteration collapse, its previous epoch works, and the momentum average
is best (paper, section 5.1 and Figure 6).

Command: dino-lab run teacher_kind
Cost: 12 trials on shapes_cpu, about 6 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis

KINDS = ("momentum", "student_copy", "previous_iteration", "previous_epoch")

ABLATION = Ablation.grid(
    axes=[Axis("teacher", {kind: {"method.teacher.kind": kind} for kind in KINDS})],
    seeds=[0, 1, 2],
    published="teacher_kind",
)
