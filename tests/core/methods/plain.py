"""DINO written from the paper with plain loops, and the settings that it is tried with."""

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from dino_lab.core.methods.dino import DINO, DINOMethod
from dino_lab.core.methods.method import Batch
from dino_lab.core.networks.backbone import Backbone
from dino_lab.core.networks.head import BottleneckHeadSettings
from dino_lab.core.networks.network import Network
from dino_lab.core.networks.teacher import Momentum

from .small import BACKBONE, SIZE, STEPS, SURROUNDINGS, B, pairs, plain_mlp, state, unit

K = 32
# The last layer moves from the first step, and the teacher's momentum stays as it is, where a test does not say else.
SETTINGS = DINO(
    head=BottleneckHeadSettings(out_dim=K, hidden_dim=32, bottleneck_dim=16, freeze_last_layer_epochs=0.0),
    teacher=Momentum(momentum_teacher=0.9, momentum_teacher_end=0.9),
)
PREDICTOR = {"predictor.kind": "mlp", "predictor.hidden_dim": 20}
MLP_HEAD = {"head.kind": "mlp", "head.layers_number": 2, "head.activation": "relu", "head.batch_norm": True}


def build(settings: DINO = SETTINGS, *, seed: int = 0, backbone: Backbone = BACKBONE) -> DINOMethod:
    torch.manual_seed(seed)
    return settings.build(backbone.build(SIZE), SURROUNDINGS)


def build_float64(settings: DINO) -> DINOMethod:
    """The lab's losses are float32 by design; float64 networks keep everything before and after them exact."""
    method = build(settings)
    method.student.double()
    method.teacher.double()
    return method


def close(ours: Tensor | float, theirs: Tensor | float, tolerance: float = 1e-5) -> None:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def reference_optimizer(model: nn.Module) -> torch.optim.AdamW:
    decayed = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and not n.endswith("bias")]
    spared = [p for n, p in model.named_parameters() if p.requires_grad and (p.ndim == 1 or n.endswith("bias"))]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


class PlainDINO:
    """Algorithm 1, section 3.1 and the appendix's switches, with a loop for every index.

    Slow, and without a line of the lab's method: of networks only the backbone is called; heads are their weights.
    """

    def __init__(self, student: Network, settings: DINO) -> None:
        self.student = student
        self.teacher = copy.deepcopy(student).eval()
        self.settings = settings
        self.center = torch.zeros(K, dtype=torch.float64)
        self.kl = self.entropy = self.teacher_temp = self.center_share = 0.0
        self.students = [state(student)]  # at the start of each step

    # ------------------------------------------------------------------------------------------- networks

    def logits(self, model: Network, crops: list[Tensor], *, predicts: bool) -> list[Tensor]:
        """Of each crop of every image; each crop goes through the backbone on its own, all through the head at once."""
        settings, head = self.settings, model.head
        x = torch.cat([model.backbone(crop) for crop in crops])
        x = plain_mlp(head.mlp, x, settings.head.activation)
        if predicts and settings.predictor.kind == "mlp":
            x = plain_mlp(model.predictor, x, settings.predictor.activation)
        if settings.head.kind == "l2_bottleneck":
            x = unit(x) @ (head.last_layer.weight_g * unit(head.last_layer.weight_v)).T
        return list(x.split(B))

    # ----------------------------------------------------------------------------------------------- loss

    def targets(self, logits: Tensor, teacher_temp: float) -> Tensor:
        """Distributions, a row for each image of each global crop."""
        operation = self.settings.operation
        if operation.kind in ("softmax_batch", "sinkhorn"):
            x = torch.exp(logits / teacher_temp)
            for _ in range(operation.iterations if operation.kind == "sinkhorn" else 1):
                x = x / x.sum(dim=0, keepdim=True)
                x = x / x.sum(dim=1, keepdim=True)
            return x
        shifted = logits - self.center
        if teacher_temp == 0:
            return torch.stack([(row == row.max()).double() for row in shifted])
        return torch.stack([torch.softmax(row / teacher_temp, dim=0) for row in shifted])

    def cross_entropy(self, teacher: list[Tensor], student: list[Tensor], epoch: int) -> Tensor:
        knobs = self.settings.loss
        warmup = np.linspace(knobs.warmup_teacher_temp, knobs.teacher_temp, knobs.warmup_teacher_temp_epochs)
        temp = warmup[epoch] if epoch < len(warmup) else knobs.teacher_temp
        self.teacher_temp = float(temp if knobs.sharpening else knobs.student_temp)
        targets = self.targets(torch.cat(teacher), self.teacher_temp).split(B)

        terms, divergences, entropies = [], [], []
        for g, v, i in pairs(len(targets), len(student)):
            q = targets[g][i]
            log_p = torch.log_softmax(student[v][i] / knobs.student_temp, dim=0)
            terms.append(-sum(q[k] * log_p[k] for k in range(K)))
            present = [(float(q[k]), float(log_p[k].detach())) for k in range(K) if q[k] > 0]
            divergences.append(sum(q_k * (math.log(q_k) - log_p_k) for q_k, log_p_k in present))
            entropies.append(-sum(q_k * math.log(q_k) for q_k, _ in present))
        self.kl, self.entropy = (sum(values) / len(values) for values in (divergences, entropies))
        return sum(terms) / len(terms)

    def comparison(self, teacher: list[Tensor], student: list[Tensor]) -> Tensor:
        """MSE, cosine or InfoNCE of vectors of length 1."""
        terms = []
        for g, v, i in pairs(len(teacher), len(student)):
            p = unit(student[v][i])
            qs = [unit(teacher[g][j] - self.center) for j in range(B)]
            if self.settings.loss.kind == "mse":
                terms.append(((qs[i] - p) ** 2).sum())
            elif self.settings.loss.kind == "cosine":
                terms.append(-(qs[i] * p).sum())
            else:
                likeness = [torch.exp((q * p).sum() / self.settings.loss.temp) for q in qs]
                terms.append(-torch.log(likeness[i] / sum(likeness)))
        return sum(terms) / len(terms)

    # ----------------------------------------------------------------------------------------------- step

    def teacher_weights(self, step: int) -> dict[str, Tensor]:
        """Those after this step."""
        kind = self.settings.teacher.kind
        if kind == "previous_iteration":
            return self.students[step]
        if kind == "previous_epoch":
            return self.students[(step + 1) // self.steps_per_epoch * self.steps_per_epoch]
        if kind == "student_copy":
            return self.students[step + 1]
        start, end = self.settings.teacher.momentum_teacher, self.settings.teacher.momentum_teacher_end
        m = end - (end - start) * (math.cos(math.pi * step / STEPS) + 1) / 2
        teacher = self.teacher.state_dict()
        return {name: m * teacher[name] + (1 - m) * theta_s for name, theta_s in self.students[step + 1].items()}

    def step(
        self, crops: Batch, step: int, *, steps_per_epoch: int, optimizer: torch.optim.Optimizer, clip: float
    ) -> Tensor:
        self.steps_per_epoch = steps_per_epoch
        epoch = step // steps_per_epoch
        student = self.logits(self.student, [*crops.global_crops, *crops.local_crops], predicts=True)
        with torch.no_grad():
            teacher = self.logits(self.teacher, [*crops.global_crops], predicts=False)
        self.center_share = float(np.mean([self.center.norm() / row.norm() for view in teacher for row in view]))
        if self.settings.loss.kind == "cross_entropy":
            loss = self.cross_entropy(teacher, student, epoch)
        else:
            loss = self.comparison(teacher, student)

        optimizer.zero_grad()
        loss.backward()
        for name, parameter in self.student.named_parameters():
            if parameter.grad is not None and clip and parameter.grad.norm() + 1e-6 > clip:
                parameter.grad *= clip / (parameter.grad.norm() + 1e-6)
            if "last_layer" in name and epoch < self.settings.head.freeze_last_layer_epochs:
                parameter.grad = None
        optimizer.step()
        self.students.append(state(self.student))

        with torch.no_grad():
            new = self.teacher_weights(step)
            for name, theta_t in self.teacher.named_parameters():
                theta_t.copy_(new[name])
            if self.settings.operation.kind == "centering":
                mean = sum(view[i] for view in teacher for i in range(B)) / (len(teacher) * B)
                m = self.settings.operation.center_momentum
                self.center = m * self.center + (1 - m) * mean
        return loss.detach()
