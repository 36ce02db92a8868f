"""Which invariance does each augmentation buy?

Expect: what an operation varies is unlearned: colour by hue jitter and grayscale, texture by blur; what all operations
leave is learned first. The paper has no such table. Left out one at a time of the reference's operations, and added
one at a time to crops alone; the heat map shows k-NN of each factor, and its difference from all of them.

Command: dino-lab run augmentation
Cost: 51 trials on shapes_cpu, about 30 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Changes
from experiments import views

# The reference's, whatever the baseline has; the strength of the blur stays the baseline's, made for its crops.
REFERENCE: dict[str, Changes] = {
    "flip": views.of(views.ALL, {"flip_probability": 0.5}),
    "light": views.of(views.ALL, {"brightness": 0.4, "contrast": 0.4}),
    "colour": views.of(views.ALL, {"saturation": 0.2, "hue": 0.1}),
    "grayscale": views.of(views.ALL, {"grayscale_probability": 0.2}),
    "blur": {
        "crops.global_1.blur_probability": 1.0,
        "crops.global_2.blur_probability": 0.1,
        "crops.local.blur_probability": 0.5,
    },
    "solarise": {"crops.global_2.solarize_probability": 0.2},
}
MORE: dict[str, Changes] = {
    "rotation": views.of(views.ALL, {"rotation_probability": 0.5}),
    "noise": views.of(views.ALL, {"noise_probability": 0.5}),
    "erasing": views.of(views.ALL, {"erasing_probability": 0.5}),
}


def without(operation: str) -> Changes:
    return dict.fromkeys(REFERENCE[operation], 0.0)


ALONE: Changes = {knob: 0.0 for changes in REFERENCE.values() for knob in changes}

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "augmentation",
            {
                "all": {},
                **{f"without {operation}": without(operation) for operation in REFERENCE},
                "crops alone": ALONE,
                **{f"crops + {name}": {**ALONE, **changes} for name, changes in (REFERENCE | MORE).items()},
            },
        )
    ],
    seeds=[0, 1, 2],
    fixed={knob: value for changes in REFERENCE.values() for knob, value in changes.items()},
)
