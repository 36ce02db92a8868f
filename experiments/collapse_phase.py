"""Where do sharpening and centring balance, and does a slower teacher widen that place?

Expect: uniform where the teacher is hot, one prototype where the centre follows too slowly for the run, and a healthy
region in between; a quicker teacher, the mean of ten steps and not of fifty, has none or a narrow one (paper, Section
5.3, Appendix D and Table 7 have its edges one knob at a time; nobody has the plane).

Command: dino-lab run collapse_phase
Cost: 40 trials on shapes_cpu, about 12 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis


def _temp(temp: float) -> dict[str, float]:
    return {"method.loss.teacher_temp": temp, "method.loss.warmup_teacher_temp": temp}


def _momentum(momentum: float) -> dict[str, float]:
    return {"method.teacher.momentum_teacher": momentum, "method.teacher.momentum_teacher_end": momentum}


ABLATION = Ablation.grid(
    axes=[
        Axis("momentum_teacher", {str(value): _momentum(value) for value in (0.98, 0.9)}),
        Axis(
            "center_momentum",
            {str(each): {"method.operation.center_momentum": each} for each in (0.9, 0.0, 0.99, 0.999)},
        ),
        Axis("teacher_temp", {str(value): _temp(value) for value in (0.04, 0.02, 0.06, 0.08, 0.1)}),
    ],
    seeds=[0],
)
