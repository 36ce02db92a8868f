"""Weights of networks, from files that the lab itself, the reference or timm wrote."""

import argparse
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dino_lab.core.checkpoint import CHECKPOINT, load

Role: TypeAlias = Literal["teacher", "student"]


@dataclass(frozen=True)
class Weights:
    """What a file holds of one network, by the names of the lab's own modules."""

    backbone: dict[str, Tensor]
    """Of a `BackboneNetwork`."""
    head: dict[str, Tensor]
    """Of a head; empty where the file has none."""
    center: Float[Tensor, "K"] | None
    """Of the teacher's logits."""
    role: Role | None
    """Whose they are; None where the file does not say."""

    @property
    def network(self) -> dict[str, Tensor]:
        """Of a `Network`."""
        return _above("backbone.", self.backbone) | _above("head.", self.head)


def find_checkpoint(name: str, trials_dir: Path) -> Path:
    """The file of that name, or the checkpoint of the trial with that id.

    Raises:
        ValueError: there is neither.
    """
    for path in (Path(name), trials_dir / name / CHECKPOINT):
        if path.is_file():
            return path
    raise ValueError(f"checkpoint {name!r}: neither a file nor a trial with a checkpoint in {trials_dir}")


# ------------------------------------------------------------------------------------------------------- reading


def read_network(name: str, trials_dir: Path) -> dict[str, Tensor]:
    """Backbone and head of a file or of a trial: its teacher's, or its student's where it has no teacher.

    Raises:
        ValueError: there is no such checkpoint, it is of a trial that has not finished, or it holds no network.
        RuntimeError: it cannot be read.
    """
    path = find_checkpoint(name, trials_dir)
    state = _load(path)
    if isinstance(state, dict) and state.get("finished") is False:  # what others wrote does not say
        raise ValueError(f"checkpoint {path}: its trial has not finished, at step {state['step']}")
    return weights_in(state, source=path).network


def read_weights(path: Path, *, role: Role | None = None) -> Weights:
    """Reads a checkpoint of the lab or of the reference, or a backbone alone, and runs no code from it.

    Without a role it is the teacher, or the student where there is no teacher. A backbone alone, as the reference and
    timm publish it, .pth or .safetensors, is read in any role.

    Source: main_dino.py, train_dino (save_dict); timm, vit_small_patch16_224.dino.

    Raises:
        ValueError: it is none of these, or has no network in that role.
        RuntimeError: it cannot be read.
    """
    return weights_in(_load(path), source=path, role=role)


def weights_in(state: Any, *, source: Path, role: Role | None = None) -> Weights:
    """The same, of what the file `source` turned out to hold.

    Raises:
        ValueError: as of `read_weights`.
    """
    networks: dict[Role, dict[str, Tensor]]
    match state:
        case {"method": method}:
            networks = {"teacher": _below("teacher.network.", method), "student": _below("student.", method)}
            center = method.get("center")
            role = role or state.get("judged")  # a teacher that was given is not what the trial trained
        case {"teacher": _} | {"student": _}:
            networks = {
                "teacher": _of_reference(state.get("teacher", {})),
                "student": _of_reference(state.get("student", {})),
            }
            center = state.get("dino_loss", {}).get("center")
        case {} if state and all(isinstance(value, Tensor) for value in state.values()):
            return Weights(_wrapped(state), head={}, center=None, role=None)
        case _:
            found = _some(state) or "nothing" if isinstance(state, dict) else f"a {type(state).__name__}"
            raise ValueError(
                f"{source}: holds {found}; expected "
                "'method' (a checkpoint of the lab), 'student' and 'teacher' (one of the reference), or the tensors of "
                "a backbone alone"
            )
    roles: tuple[Role, ...] = (role,) if role else ("teacher", "student")
    for each in roles:
        if backbone := _below("backbone.", networks[each]):
            head = _below("head.", networks[each])
            return Weights(backbone, head, None if center is None else center.flatten(), each)
    raise ValueError(f"{source}: has no {' and no '.join(roles)}; expected names that begin with 'backbone.'")


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise RuntimeError(f"checkpoint {path} cannot be read: {error}") from error
    # The reference keeps its command line beside the weights: a Namespace of numbers and words.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return load(path)


def _of_reference(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's names of backbone and head as those of a `Network`.

    DistributedDataParallel's "module." is before the student's, and before the teacher's where batch normalisation
    made the reference wrap that too.
    """
    plain = {name.removeprefix("module."): value for name, value in weights.items()}
    return _above("backbone.", _wrapped(_below("backbone.", plain))) | _above("head.", _below("head.", plain))


def _wrapped(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names, of a vision transformer the reference's too, as those of a `VisionTransformer` or a `Pooled`."""
    return _above("vit." if "pos_embed" in backbone else "model.", backbone)


def _above(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------- loading


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Gives a network, in place, the weights that `source` was found to hold: all of them, and no others.

    Position embeddings of another image size replace the network's own, grid and all: `VisionTransformer` interpolates
    from the grid that it holds straight to that of a crop, as the reference does. By way of the network's first grid
    it would interpolate twice, to other features.

    Raises:
        ValueError: names or shapes are others; the network is then as it was.
    """
    own = network.state_dict()
    both = sorted(own.keys() & weights.keys())
    grids = [name for name in both if name.endswith("vit.pos_embed") and _is_other_grid(weights[name], own[name])]
    shapes = {name: (list(weights[name].shape), list(own[name].shape)) for name in both if name not in grids}
    wrong = {
        "lacks": own.keys() - weights.keys(),
        "has, besides what is expected,": weights.keys() - own.keys(),
        "has": [f"{name} {theirs} for {ours}" for name, (theirs, ours) in shapes.items() if theirs != ours],
    }
    if any(wrong.values()):
        found = "; ".join(f"{what} {_some(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{source} is of another network: it {found}")
    for name in grids:
        parameter = network.get_parameter(name)
        empty = parameter.data.new_empty(weights[name].shape)
        module, _, last = name.rpartition(".")
        setattr(network.get_submodule(module), last, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    network.load_state_dict(weights)


def _is_other_grid(embedding: Tensor, own: Tensor) -> bool:
    """Whether these are position embeddings as the network's own, of a CLS token and another square of patches."""
    if embedding.ndim != 3 or embedding.shape[::2] != own.shape[::2]:
        return False
    number = embedding.shape[1]
    return number != own.shape[1] and number == 1 + math.isqrt(number - 1) ** 2


def _some(names: Collection[str]) -> str:
    """A few of these names, and how many more there are."""
    few = sorted(map(str, names))[:4]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "")
