"""How slowly must the teacher follow the student, and should it come to a halt?

Expect: a copy of the student (0) collapses, a slow teacher (0.996 and up) works on ImageNet (paper, Section 5.2);
a short run needs a faster one, since it has too few steps to catch up, and no halt (0.98->1, a cosine as the paper's).

Command: dino-lab run momentum_teacher
Cost: 21 trials on shapes_cpu, about 11 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis


def _cosine(start: float, end: float) -> dict[str, float]:
    return {"method.teacher.momentum_teacher": start, "method.teacher.momentum_teacher_end": end}


ABLATION = Ablation.one_at_a_time(
    axes=[
        Axis(
            "momentum_teacher",
            {str(value): _cosine(value, value) for value in (0.0, 0.9, 0.99, 0.996, 1.0)}
            | {"0.98->1": _cosine(0.98, 1.0)},
        )
    ],
    seeds=[0, 1, 2],
)
