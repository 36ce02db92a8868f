"""What trained networks show of the images that they are judged by: attention, prototypes, means of classes.

Of each trial it is the network that is judged, the teacher's or the student's, at its last checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from analysis.looks import Attended, ClassMeans, Prototype, Slide
from dino_lab.asking import find_trial
from dino_lab.core.checkpoint import load
from dino_lab.core.data.batches import Wholes
from dino_lab.core.data.crops import as_pixels
from dino_lab.core.data.images import ImageSet
from dino_lab.core.evals.attention import jaccard, patches_of_mass, whole_masks
from dino_lab.core.evaluation import opened
from dino_lab.core.methods.mae import MAE
from dino_lab.core.methods.masked import Masked
from dino_lab.core.methods.patches import PatchMean
from dino_lab.core.networks.backbone import BackboneNetwork, VisionTransformer
from dino_lab.core.networks.head import BottleneckHeadSettings
from dino_lab.core.networks.weights import Weights, load_weights, weights_in
from dino_lab.core.trial import Trial
from dino_lab.orchestration.folder import TrialFolder
from dino_lab.preparing import data_dir

_MASS = 0.6
"""Part of a head's attention that counts as what it marks: the paper's."""


def attention(trial_ids: Sequence[str], lab: Path, *, rows: int = 6) -> Slide:
    """Attention of the last block of each trial's network and, first, of the untrained network of the first trial.

    Raises:
        ValueError: a trial is not there or has no checkpoint, its network no CLS token that attends, or its images are
            others than the first trial's.
    """
    trials = [find_trial(trial_id, lab) for trial_id in trial_ids]
    first = trials[0]
    for trial in trials:
        if not trial.backbone.has_tokens:
            raise ValueError(f"trial {trial.identity}: backbone.name = {trial.backbone.name!r} has no CLS token")
        if isinstance(trial.method, MAE | Masked):
            raise ValueError(f"trial {trial.identity}: method.kind = {trial.method.kind!r} trains no CLS token")
        if trial.judged != first.judged or trial.crops.global_crops_size != first.crops.global_crops_size:
            raise ValueError(f"trial {trial.identity}: is judged by other images than trial {first.identity}")
    images = _evaluated(first, lab)
    size = first.crops.global_crops_size
    if images.masks is None:
        images = images.subset(np.arange(min(rows, len(images))))  # no others are judged
    crops = _crops(images, size)
    masks = None if images.masks is None else whole_masks(images.masks[torch.from_numpy(images.places)], size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(first.seed)
        networks: list[tuple[str, BackboneNetwork]] = [("untrained", first.backbone.build(size))]
    networks += [(f"{trial.method.kind} {trial.identity}", _backbone(trial, lab)) for trial in trials]
    seen = [_attended(name, network, crops, masks, rows) for name, network in networks]
    return Slide(as_pixels(crops[:rows]).numpy(), None if masks is None else masks[:rows].numpy(), tuple(seen))


def prototypes(trial_id: str, lab: Path, *, number: int = 8, nearest: int = 6) -> list[Prototype]:
    """The prototypes that most images choose, most chosen first; fewer if fewer are chosen.

    Raises:
        ValueError: the trial is not there, has no checkpoint, or no head with prototypes of images.
    """
    trial = find_trial(trial_id, lab)
    settings = getattr(trial.method, "head", None)
    if not isinstance(settings, BottleneckHeadSettings):
        raise ValueError(f"trial {trial_id}: method.kind = {trial.method.kind!r} has no head with prototypes")
    if isinstance(trial.method, Masked):
        raise ValueError(f"trial {trial_id}: method.kind = 'masked' has prototypes of patches, not of images")
    weights, backbone = _weights(trial, lab), _backbone(trial, lab)
    head = settings.build(backbone.embed_dim)
    load_weights(head, weights.head, source=f"the checkpoint of trial {trial_id}")
    images, size = _evaluated(trial, lab), trial.crops.global_crops_size
    # A student's logits are not centred.
    center = weights.center if weights.center is not None and weights.role == "teacher" else torch.zeros(())
    blocks = _features(backbone, images, size).split(1024)
    with torch.inference_mode():
        head.eval()
        # Twice, since all logits of ImageNet's images would need 13 GB.
        first = torch.cat([(head(block) - center).argmax(dim=-1) for block in blocks])
        counts = torch.bincount(first, minlength=settings.out_dim)
        chosen = [int(each) for each in counts.argsort(descending=True)[:number] if counts[each]]
        logits = torch.cat([head(block)[:, chosen] for block in blocks])
    places = logits.topk(min(nearest, len(logits)), dim=0).indices.T.numpy()
    return [
        Prototype(each, float(counts[each]) / len(logits), as_pixels(_crops(images.subset(near), size)).numpy())
        for each, near in zip(chosen, places, strict=True)
    ]


def class_means(trial_id: str, lab: Path) -> ClassMeans:
    """The means of classes in the plane in which they differ most, and the images that are evaluated there.

    Raises:
        ValueError: the trial is not there, has no checkpoint, or its images have no labels, or fewer than three.
    """
    trial = find_trial(trial_id, lab)
    images = _evaluated(trial, lab)
    if not images.labels:
        raise ValueError(f"trial {trial_id}: its images have no labels")
    shown, places = images.labels["class"].unique(return_inverse=True)
    if len(shown) < 3:
        raise ValueError(f"trial {trial_id}: its images have {len(shown)} classes, and a plane shows three or more")
    backbone = _backbone(trial, lab)
    judged: nn.Module = backbone
    if isinstance(trial.method, MAE | Masked):  # judged by the mean of the patches, which are what it trains
        assert isinstance(backbone, VisionTransformer)
        judged = PatchMean(backbone)
    features = nn.functional.normalize(_features(judged, images, trial.crops.global_crops_size), dim=-1)
    means = torch.stack([features[places == place].mean(dim=0) for place in range(len(shown))])
    middle = means.mean(dim=0)
    _, spread, directions = torch.linalg.svd(means - middle, full_matrices=False)
    points, centers = (features - middle) @ directions[:2].T, (means - middle) @ directions[:2].T
    names = tuple(images.classes["class"][int(label)] for label in shown)
    explained = float((spread[:2] ** 2).sum() / (spread**2).sum())
    return ClassMeans(points.numpy(), places.numpy(), centers.numpy(), names, explained)


def _evaluated(trial: Trial, lab: Path) -> ImageSet:
    _, evaluation = opened(trial, data_dir(lab))
    if not evaluation.images:
        raise ValueError(f"trial {trial.identity}: nothing is evaluated, as its images have neither labels nor masks")
    return evaluation.images["evaluation"]


def _weights(trial: Trial, lab: Path) -> Weights:
    path = TrialFolder(lab, trial.identity).checkpoint
    if not path.exists():
        raise ValueError(f"trial {trial.identity}: has no checkpoint yet")
    return weights_in(load(path), source=path)


def _backbone(trial: Trial, lab: Path) -> BackboneNetwork:
    backbone = trial.backbone.build(trial.crops.global_crops_size)
    load_weights(backbone, _weights(trial, lab).backbone, source=f"the checkpoint of trial {trial.identity}")
    return backbone


def _crops(images: ImageSet, size: int) -> Float[Tensor, "N 3 size size"]:
    return torch.cat(list(Wholes(images, size).load(loader_workers=0)))


@torch.inference_mode()
def _features(network: nn.Module, images: ImageSet, size: int) -> Float[Tensor, "N D"]:
    """Some hundreds of images at a time: all of ImageNet's would need 30 GB."""
    network.eval()
    return torch.cat([network(part) for part in Wholes(images, size).load(loader_workers=0)])


@torch.inference_mode()
def _attended(
    name: str,
    network: BackboneNetwork,
    crops: Float[Tensor, "N 3 S S"],
    masks: UInt8[Tensor, "N S S"] | None,
    rows: int,
) -> Attended:
    assert isinstance(network, VisionTransformer)
    network.eval()
    maps = torch.cat([network.look(part, blocks_number=1).attention for part in crops.split(256)])
    if masks is None:
        return Attended(name, maps[:rows].mean(dim=1).numpy(), None, None)
    marked = patches_of_mass(maps, _MASS)
    by_head = torch.stack([jaccard(head[:, None], masks) for head in marked.unbind(1)], dim=1)
    best = by_head.nan_to_num(nan=-1).argmax(dim=1)
    shown = maps[torch.arange(len(maps)), best]
    overall = 100 * float(jaccard(marked, masks).nanmean())
    return Attended(name, shown[:rows].numpy(), 100 * by_head.amax(dim=1)[:rows].numpy(), overall)
