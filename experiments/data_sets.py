"""Does what is learned on one data set tell the images of another apart?

Expect: less well than what is learned on its own images, and better than an untrained network; the paper pretrains
on other data for retrieval (Table 3) and has no such table. There are 1,437 digits and 4,000 shapes, so that three
times the epochs make about as many steps. k-NN of digits and of shapes are not to be compared with each other.

Command: dino-lab run data_sets
Cost: 12 trials on shapes_cpu, about 7 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Changes, Like
from dino_lab.core.data.sources import Shapes
from experiments.data_size import IN_EPOCHS

ON_DIGITS: Changes = {
    "data.kind": "digits",
    **{knob: Like(knob, times=3.0) for knob in IN_EPOCHS},
}
# As they are in the other rows, whatever is set for them.
JUDGED_BY_SHAPES: Changes = {
    "evals.data.kind": "shapes",
    **{f"evals.data.{knob}": Like(f"data.{knob}") for knob in Shapes.model_fields if knob not in ("kind", "classes")},
}
JUDGED_BY_DIGITS: Changes = {"evals.data.kind": "digits", "evals.data.image_size": Like("data.image_size")}

ABLATION = Ablation.grid(
    axes=[
        Axis(
            "trained -> judged",
            {
                "shapes -> shapes": {},
                "digits -> shapes": {**ON_DIGITS, **JUDGED_BY_SHAPES},
                "digits -> digits": ON_DIGITS,
                "shapes -> digits": JUDGED_BY_DIGITS,
            },
        )
    ],
    seeds=[0, 1, 2],
    fixed={"data.kind": "shapes"},
)
