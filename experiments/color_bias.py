"""What does DINO learn where colour predicts the class, or the background does?

Expect: no label is seen, so colour is learned wherever crops keep it. Where it predicts the class among the training
images, from which k-NN takes its neighbours, it misleads in the test split, where it does not. Always gray crops, from
which background is learned in its place, should be safe from it, and misled by backgrounds that predict. The paper has
no such table. Not shape: nothing learns it on shapes_cpu, so nothing could be lost.

Command: dino-lab run color_bias
Cost: 30 trials on shapes_cpu, about 18 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis
from experiments import views

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "class",
            {
                "background": {"data.class_factor": "background"},
                "background, told by colour 0.9": {"data.class_factor": "background", "data.color_predicts_class": 0.9},
                "background, told by colour 1": {"data.class_factor": "background", "data.color_predicts_class": 1.0},
                "colour": {"data.class_factor": "color"},
                "colour, told by background 1": {
                    "data.class_factor": "color",
                    "data.background_predicts_class": 1.0,
                },
            },
        ),
        Axis("crops", {"in colour": {}, "gray": views.of(views.ALL, {"grayscale_probability": 1.0})}),
    ],
    seeds=[0, 1, 2],
    fixed={"data.kind": "shapes"},
)
