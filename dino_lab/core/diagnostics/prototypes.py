"""How prototypes are used: running means over the targets of the steps so far, the one signal that has a state."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dino_lab.core import distributed, records


class PrototypeUse:
    """The mean target, and how often each prototype is a target's largest.

    One batch says little of K prototypes where it has fewer targets: n targets have a marginal entropy of ln n at most.
    So these are running means over the last K targets or so; over those of a step alone if it has K. Every step is
    seen, so that how often records are made changes nothing.

    What targets say of their images is measured within a step: targets that are the same for all images, but wander
    from step to step, say nothing.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._means: dict[str, Tensor] = {}
        self._parts: list[dict[str, Tensor]] = []
        self._step: dict[str, Tensor] = {}
        self._seen = 0

    @torch.no_grad()
    def see(self, targets: Float[Tensor, "*N K"]) -> None:
        """The targets of a step, or of one of several equal parts of it; of those a rank's share."""
        rows = targets.flatten(0, -2)
        chosen = torch.zeros_like(rows[0]).index_add_(0, rows.argmax(dim=-1), torch.ones_like(rows[:, 0]))
        entropy = torch.special.entr(rows).sum(dim=-1).mean()
        self._parts.append({"target": rows.mean(dim=0), "entropy": entropy, "chosen": chosen / len(rows)})
        self._seen += distributed.workers() * len(rows)

    @torch.no_grad()
    def end_step(self) -> None:
        """Takes what was seen since the last step into the running means, if anything was."""
        if not self._parts:
            return
        of_parts = {name: torch.stack([part[name] for part in self._parts]).mean(dim=0) for name in self._parts[0]}
        self._step = dict(zip(of_parts, distributed.means(list(of_parts.values())), strict=True))
        self._steps += 1
        # A plain mean until there are enough, or the first step would count for as much as hundreds after it.
        weight = min(1.0, max(self._seen / len(self._step["target"]), 1 / self._steps))
        for name in ("target", "chosen"):
            self._means[name] = self._means.get(name, self._step[name]).lerp(self._step[name], weight)
        self._parts.clear()
        self._seen = 0

    @torch.no_grad()
    def measures(self) -> dict[str, float | Tensor]:
        """By logged name, after a step; none where there are no targets."""
        if not self._step:
            return {}
        chosen = self._means["chosen"]
        # What was chosen once and then not again while the window passed has kept 1/e of its share.
        in_use = chosen > math.exp(-1) / len(chosen)
        return {
            records.PROTOTYPES_NUMBER: len(chosen),
            records.MARGINAL_ENTROPY: torch.special.entr(self._means["target"]).sum(),
            records.MUTUAL_INFORMATION: torch.special.entr(self._step["target"]).sum() - self._step["entropy"],
            records.PROTOTYPES_IN_USE: in_use.sum(),
            records.PROTOTYPES_PERPLEXITY: torch.special.entr(chosen).sum().exp(),
            records.LARGEST_SHARE: chosen.max(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "means": self._means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._means = state["steps"], dict(state["means"])
