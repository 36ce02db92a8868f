"""What does one augmentation buy that is added to crops alone?

Expect: jitter of brightness and contrast makes colour the surest sign of an image, jitter of hue and grayscale unmake
it; rotation, noise and erasing, which the reference has not, are what users ask about next. The paper has no such
table. The heat map shows k-NN of each factor, and its difference from crops alone.

Command: dino-lab run augmentation_alone
Cost: 30 trials on shapes_cpu, about 18 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Changes
from experiments import views
from experiments.augmentation import BLUR_SIGMA, OPERATIONS, off

MORE: dict[str, Changes] = {
    "rotation": views.of(views.ALL, {"rotation_probability": 0.5}),
    "noise": views.of(views.ALL, {"noise_probability": 0.5}),
    "erasing": views.of(views.ALL, {"erasing_probability": 0.5}),
}

ABLATION = Ablation.grid(
    axes=[
        Axis("augmentation", {"crops alone": {}, **{f"+ {name}": on for name, on in (OPERATIONS | MORE).items()}}),
    ],
    seeds=[0, 1, 2],
    fixed={knob: value for operation in OPERATIONS for knob, value in off(operation).items()} | BLUR_SIGMA,
)
