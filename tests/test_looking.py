"""What trained networks show of images, against plain calls of the networks, and the command that draws it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_lab.asking import find_trial
from dino_lab.core.data.batches import Wholes
from dino_lab.core.evals.attention import Attention, whole_masks
from dino_lab.core.trainer import CHECKPOINT, train
from dino_lab.core.trial import Trial
from dino_lab.looking import _backbone, attention, class_means, prototypes
from dino_lab.orchestration.folder import TrialFolder
from dino_lab.preparing import data_dir


def trained(lab: Path, trial: Trial) -> str:
    """An epoch of a trial in the lab."""
    trial = trial.but({"epochs": 1, "runtime.data_dir": str(data_dir(lab))})
    folder = TrialFolder(lab, trial.identity)
    folder.begin(trial)
    list(train(trial, workdir=folder.path))
    return trial.identity


@pytest.fixture
def of_dino(smoke: Trial, tmp_path: Path) -> str:
    return trained(tmp_path, smoke)


def test_networks_stand_side_by_side_with_the_index_that_evaluation_gives(
    of_dino: str, smoke: Trial, tmp_path: Path
) -> None:
    supervised = trained(tmp_path, smoke.but({"method.kind": "supervised"}))
    slide = attention([of_dino, supervised], tmp_path, rows=3)
    assert [each.name for each in slide.networks] == ["untrained", f"dino {of_dino}", f"supervised {supervised}"]
    assert slide.images.shape == (3, 16, 16, 3)
    assert slide.masks is not None
    assert slide.masks.shape == (3, 16, 16)
    judged = smoke.but({"evals.at_end": ["attention"], "epochs": 1, "runtime.data_dir": str(data_dir(tmp_path))})
    *_, last = train(judged, workdir=_folder(tmp_path, "judged"))
    assert slide.networks[1].mean_jaccard == pytest.approx(last.values["eval/jaccard_60"])
    first, *_ = train(judged, workdir=_folder(tmp_path, "again"))
    assert slide.networks[0].mean_jaccard == pytest.approx(first.values["eval/jaccard_60"])


def _folder(path: Path, name: str) -> Path:
    (path / name).mkdir()
    return path / name


def test_the_map_that_is_shown_is_that_of_the_head_with_the_best_index(
    of_dino: str, smoke: Trial, tmp_path: Path
) -> None:
    network = attention([of_dino], tmp_path, rows=4).networks[1]
    images = smoke.data.build("test", data_dir(tmp_path))
    trial = smoke.but({"epochs": 1})
    crops = torch.cat(list(Wholes(images, 16).load(loader_workers=0)))[:4]
    with torch.no_grad():
        seen = _backbone(trial, tmp_path).eval().look(crops, blocks_number=1).attention
    masks = whole_masks(images.masks, 16)[:4]
    for row, head in itertools.product(range(4), range(seen.shape[1])):
        alone = Attention(mass=(0.6,)).jaccard(seen[row : row + 1, head : head + 1], masks[row : row + 1])[0.6]
        assert alone <= network.jaccards[row] + 1e-5
        if alone == pytest.approx(network.jaccards[row]):
            best = seen[row, head]
            if np.allclose(network.maps[row], best, atol=1e-6):
                break
    else:
        pytest.fail("no head has the map that is shown and its index")


def test_prototypes_are_those_that_most_images_choose_with_the_images_nearest_to_them(
    of_dino: str, smoke: Trial, tmp_path: Path
) -> None:
    found = prototypes(of_dino, tmp_path, number=3, nearest=2)
    shares = [each.share for each in found]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    state = torch.load(tmp_path / "trials" / of_dino / CHECKPOINT, weights_only=True)["method"]
    trial = smoke.but({"epochs": 1})
    crops = torch.cat(list(Wholes(smoke.data.build("test", data_dir(tmp_path)), 16).load(loader_workers=0)))
    head = trial.method.head.build(trial.backbone.embed_dim)
    prefix = "teacher.network.head."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    with torch.no_grad():
        logits = head(_backbone(trial, tmp_path).eval()(crops)) - state["center"]
    counts = torch.bincount(logits.argmax(dim=-1), minlength=logits.shape[1])
    assert [counts[each.number] / len(crops) for each in found] == pytest.approx(shares)
    assert shares[0] == pytest.approx(float(counts.max()) / len(crops))
    place = int(logits[:, found[0].number].argmax())
    whole = crops[place] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    whole = whole + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    expected = (255 * whole).round().movedim(0, -1).numpy()
    assert np.abs(found[0].nearest[0].astype(float) - expected).max() <= 1


def test_classes_lie_in_the_plane_in_which_their_means_differ_most(of_dino: str, smoke: Trial, tmp_path: Path) -> None:
    found = class_means(of_dino, tmp_path)
    images = smoke.data.build("test", data_dir(tmp_path))
    crops = torch.cat(list(Wholes(images, 16).load(loader_workers=0)))
    with torch.no_grad():
        features = F.normalize(_backbone(smoke.but({"epochs": 1}), tmp_path).eval()(crops), dim=-1)
    labels, names = images.labels["class"].numpy(), images.classes["class"]
    there = np.unique(labels)
    assert found.names == tuple(names[label] for label in there)
    rows = features.double().numpy()
    means = np.stack([rows[labels == label].mean(axis=0) for label in there])
    middle = means.mean(axis=0)
    values, vectors = np.linalg.eigh((means - middle).T @ (means - middle))
    plane = vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(found.points), np.abs((rows - middle) @ plane), atol=1e-4)
    np.testing.assert_allclose(np.abs(found.means), np.abs((means - middle) @ plane), atol=1e-4)
    assert found.explained == pytest.approx(values[-2:].sum() / values.sum(), rel=1e-3)
    for place in range(len(there)):
        np.testing.assert_allclose(found.points[found.labels == place].mean(axis=0), found.means[place], atol=1e-5)


def test_a_class_of_which_no_image_is_evaluated_is_not_shown(smoke: Trial, tmp_path: Path) -> None:
    trial = smoke.but({"data.test_images": 4})
    found = class_means(trained(tmp_path, trial), tmp_path)
    images = trial.data.build("test", data_dir(tmp_path))
    occurring = images.labels["class"].unique().tolist()
    assert 3 <= len(occurring) < len(images.classes["class"])
    assert found.names == tuple(images.classes["class"][label] for label in occurring)
    assert np.isfinite(found.points).all()
    with pytest.raises(ValueError, match="its images have 2 classes, and a plane shows three or more"):
        class_means(trained(tmp_path, smoke.but({"data.test_images": 2})), tmp_path)


def test_what_trains_patches_lies_where_the_mean_of_its_patches_does(smoke: Trial, tmp_path: Path) -> None:
    trial = smoke.but({"method.kind": "masked", "crops.local_crops_number": 0})
    masked = trained(tmp_path, trial)
    found = class_means(masked, tmp_path)
    crops = torch.cat(list(Wholes(smoke.data.build("test", data_dir(tmp_path)), 16).load(loader_workers=0)))
    with torch.no_grad():
        backbone = _backbone(find_trial(masked, tmp_path), tmp_path).eval()
        features = F.normalize(backbone.encode(backbone.tokens(crops))[:, 1:].mean(dim=1), dim=-1)
    labels = smoke.data.build("test", data_dir(tmp_path)).labels["class"]
    means = torch.stack([features[labels == label].mean(dim=0) for label in labels.unique()])
    spread = torch.linalg.svdvals(means - means.mean(dim=0)) ** 2
    assert found.explained == pytest.approx(float(spread[:2].sum() / spread.sum()), rel=1e-3)
    with pytest.raises(ValueError, match=r"method\.kind = 'masked' trains no CLS token"):
        attention([masked], tmp_path)
    with pytest.raises(ValueError, match="has prototypes of patches, not of images"):
        prototypes(masked, tmp_path)


def test_logits_of_a_student_that_is_judged_are_not_centred(of_dino: str, smoke: Trial, tmp_path: Path) -> None:
    student = trained(
        tmp_path, smoke.but({"method.teacher.kind": "frozen", "method.teacher.checkpoint": of_dino, "seed": 1})
    )
    path = tmp_path / "trials" / student / CHECKPOINT
    state = torch.load(path, weights_only=True)
    assert state["judged"] == "student"
    before = prototypes(student, tmp_path)
    state["method"]["center"][before[0].number] += 100
    torch.save(state, path)
    assert [each.number for each in prototypes(student, tmp_path)] == [each.number for each in before]


def test_where_no_objects_are_marked_the_mean_of_heads_is_shown_without_an_index(smoke: Trial, tmp_path: Path) -> None:
    trial = smoke.but({"data": {"kind": "digits"}, "backbone.num_heads": 2})
    slide = attention([trained(tmp_path, trial)], tmp_path, rows=3)
    assert slide.masks is None
    assert slide.images.shape == (3, 16, 16, 3)
    assert {(each.jaccards, each.mean_jaccard) for each in slide.networks} == {(None, None)}
    images = trial.data.build("test", data_dir(tmp_path))
    crops = next(iter(Wholes(images, 16).load(loader_workers=0)))[:3]
    with torch.no_grad():
        seen = _backbone(trial.but({"epochs": 1}), tmp_path).eval().look(crops, blocks_number=1).attention
    assert seen.shape[1] == 2
    np.testing.assert_allclose(slide.networks[1].maps, seen.mean(dim=1), atol=1e-6)


def test_a_head_with_batch_normalisation_is_as_in_use(smoke: Trial, tmp_path: Path) -> None:
    trial = smoke.but({"method.head.batch_norm": True})
    found = prototypes(trained(tmp_path, trial), tmp_path)
    trial = trial.but({"epochs": 1})
    state = torch.load(tmp_path / "trials" / trial.identity / CHECKPOINT, weights_only=True)["method"]
    head = trial.method.head.build(trial.backbone.embed_dim).eval()
    prefix = "teacher.network.head."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    crops = torch.cat(list(Wholes(smoke.data.build("test", data_dir(tmp_path)), 16).load(loader_workers=0)))
    with torch.no_grad():
        logits = head(_backbone(trial, tmp_path).eval()(crops)) - state["center"]
    counts = torch.bincount(logits.argmax(dim=-1), minlength=logits.shape[1])
    assert {each.number: each.share for each in found} == pytest.approx(
        {each.number: int(counts[each.number]) / len(crops) for each in found}
    )


def test_of_fewer_images_than_are_to_be_shown_all_are(smoke: Trial, tmp_path: Path) -> None:
    few = trained(tmp_path, smoke.but({"data.test_images": 4}))
    assert {len(each.nearest) for each in prototypes(few, tmp_path)} == {4}


def test_what_cannot_be_looked_at_is_refused(smoke: Trial, of_dino: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown trial 'abc'"):
        attention(["abc"], tmp_path)
    other = trained(tmp_path, smoke.but({"data.test_images": 16}))
    with pytest.raises(ValueError, match=f"trial {other}: is judged by other images than trial {of_dino}"):
        attention([of_dino, other], tmp_path)
    begun = smoke.but({"seed": 9, "epochs": 1})
    TrialFolder(tmp_path, begun.identity).begin(begun)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        class_means(begun.identity, tmp_path)
    supervised = trained(tmp_path, smoke.but({"method.kind": "supervised"}))
    with pytest.raises(ValueError, match=r"method\.kind = 'supervised' has no head with prototypes"):
        prototypes(supervised, tmp_path)
    pooled = trained(tmp_path, smoke.but({"backbone.name": "resnet18"}))
    with pytest.raises(ValueError, match=r"backbone\.name = 'resnet18' has no CLS token"):
        attention([pooled], tmp_path)
    assert class_means(pooled, tmp_path).points.shape == (24, 2)
