"""Which invariance does each of the reference's augmentations buy?

Expect: what an operation varies is unlearned: colour by jitter of hue and grayscale, texture by blur; what all of them
leave is learned first. Left out one at a time; the paper has no such table. The heat map shows k-NN of each factor, and
its difference from all operations together. Blur has the reference's strength in pixels, which is more of a small crop.

Command: dino-lab run augmentation
Cost: 21 trials on shapes_cpu, about 12 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Changes
from experiments import views

# The reference's, whatever the baseline has.
OPERATIONS: dict[str, Changes] = {
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
BLUR_SIGMA = views.of(views.ALL, {"blur_sigma": [0.1, 2.0]})


def off(operation: str) -> Changes:
    return dict.fromkeys(OPERATIONS[operation], 0.0)


ABLATION = Ablation.grid(
    axes=[Axis("augmentation", {"all": {}, **{f"without {operation}": off(operation) for operation in OPERATIONS}})],
    seeds=[0, 1, 2],
    fixed={knob: value for changes in OPERATIONS.values() for knob, value in changes.items()} | BLUR_SIGMA,
)
