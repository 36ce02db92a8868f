"""How many images does DINO need, if it trains for as many steps?

Expect: fewer images, each seen more often, are worse below some number; the paper has no such table. Each level is a
fraction of each class's training images, with epochs and what is counted in epochs stretched so that there are about as
many steps. k-NN takes its neighbours from all of them in every row.

Command: dino-lab run data_size
Cost: 15 trials on shapes_cpu, about 9 minutes on 2 cores.
"""

from dino_lab.ablation import Ablation, Axis, Changes, Like

IN_EPOCHS = (
    "epochs",
    "evals.every_epochs",
    "optimizer.warmup_epochs",
    "method.head.freeze_last_layer_epochs",
    "method.loss.warmup_teacher_temp_epochs",
)


def part(times: int) -> Changes:
    return {"data.fraction": 1 / times, **{knob: Like(knob, times=times) for knob in IN_EPOCHS}}


ABLATION = Ablation.grid(
    axes=[Axis("fraction", {"1": {}, **{f"1/{times}": part(times) for times in (2, 4, 10, 20)}})],
    seeds=[0, 1, 2],
)
