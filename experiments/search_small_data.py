"""Which settings learn most from few images in few steps, and what must be right for anything to be learned?

Expect: the temperatures and the centre decide whether anything is learned at all (paper, Appendix D and Table 7: sharp
enough and not too sharp, a centre that follows), the learning rate how much; K and the crops matter least (Table 8 and
Section 5.3). With half the images in half the steps there is room above the baseline, and much depends on the seed.

Command: dino-lab run search_small_data
Cost: 60 trials on shapes_cpu, about 10 minutes on 2 cores.
"""

from dino_lab.space import Between, OneOf, Search

SEARCH = Search(
    space={
        "optimizer.lr": Between(0.004, 0.25, log=True),
        # Constant temperatures and momenta: there are no steps to spare for a schedule.
        ("method.loss.teacher_temp", "method.loss.warmup_teacher_temp"): Between(0.02, 0.08),
        "method.loss.student_temp": Between(0.05, 0.2, log=True),
        ("method.teacher.momentum_teacher", "method.teacher.momentum_teacher_end"): Between(0.9, 0.996),
        "method.operation.center_momentum": Between(0.5, 0.99),
        "method.head.out_dim": OneOf([16, 64, 256, 1024]),
        "crops.local_crops_number": Between(0, 8, step=2),
    },
    objectives=["eval/knn_top1"],
    trials=60,
    sampler="tpe",
    # The gentlest: quick starters are not the best ones.
    pruner="median",
    fixed={"data.fraction": 0.5},
)
