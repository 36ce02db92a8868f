"""How hot may the teacher be?

Expect: stable to about 0.06, collapse to uniform above unless it is warmed up (paper, Appendix D); best at 0.04
with a warm-up to 0.07. 0 is arg-max, which learns, but less.

Command: dino-lab run teacher_temperature
Cost: 18 trials on shapes_cpu, about 9 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Like


def _constant(temp: float) -> dict[str, float]:
    return {"method.loss.teacher_temp": temp, "method.loss.warmup_teacher_temp": temp}


ABLATION = Ablation.grid(
    axes=[
        Axis(
            "teacher_temp",
            {
                "0.04": _constant(0.04),
                "0": _constant(0.0),
                "0.02": _constant(0.02),
                "0.06": _constant(0.06),
                "0.08": _constant(0.08),
                "0.04->0.07": {
                    "method.loss.teacher_temp": 0.07,
                    "method.loss.warmup_teacher_temp": 0.04,
                    # The first 50 of 100 epochs.
                    "method.loss.warmup_teacher_temp_epochs": Like("epochs", times=0.5),
                },
            },
        )
    ],
    seeds=[0, 1, 2],
    published="teacher_temperature",
)
