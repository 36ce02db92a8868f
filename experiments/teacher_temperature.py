"""How hot may the teacher be?

Expect: stable to about 0.06, collapse to uniform above unless it is warmed up (paper, Appendix D); best at 0.04
with a warm-up to 0.07.

Command: dino-lab run teacher_temperature
Cost: 15 trials on shapes_cpu, about 8 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis


def _constant(temp: float) -> dict[str, float]:
    return {"method.teacher_temp": temp, "method.warmup_teacher_temp": temp}


ABLATION = Ablation.grid(
    axes=[
        Axis(
            "teacher_temp",
            {
                "0.04": _constant(0.04),
                "0.02": _constant(0.02),
                "0.06": _constant(0.06),
                "0.08": _constant(0.08),
                "0.04->0.07": {
                    "method.teacher_temp": 0.07,
                    "method.warmup_teacher_temp": 0.04,
                    "method.warmup_teacher_temp_epochs": 1,
                },
            },
        )
    ],
    seeds=[0, 1, 2],
    published="teacher_temperature",
)
