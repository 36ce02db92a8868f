import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dino_lab import cli, lint
from dino_lab.core.trial import Trial
from dino_lab.lint import Finding
from experiments import baselines, views
from experiments.baselines import BASELINES

LAB_BOOK = Path(baselines.__file__).parent
IMAGES = 4000
"""Those of shapes_cpu: 250 steps of 16 an epoch, 500 in all."""
RECIPES = ("imagenet_vits16", "imagenet_vits16_300", "imagenet_vits8", "imagenet_vitb16", "imagenet_resnet50")
Changes = dict[str, Any]


def _teacher(start: float, end: float | None = None) -> Changes:
    return {
        "method.teacher.momentum_teacher": start,
        "method.teacher.momentum_teacher_end": start if end is None else end,
    }


WARM = {"method.loss.warmup_teacher_temp_epochs": 1}
SINKHORN = {"method.operation.kind": "sinkhorn"}
MLP = {"method.head.kind": "mlp"}
SWAV = {"method.kind": "swav", "method.prototypes_number": 512, "method.freeze_prototypes_epochs": 0.2}
BYOL = {"method.kind": "byol"}
TWO_CROPS = {"crops.local_crops_number": 0}
WIDE = views.of(views.GLOBAL, {"scale": [0.14, 1.0]})
BLURRED = {"crops.local.blur_probability": 0.5}
BASE = {"backbone.name": "vit_base_patch16_224", "method.head.norm_last_layer": False}

# What breaks a rule, and what is next to it and does not.
CASES: list[tuple[str, Changes, Changes]] = [
    ("hot_start", {"method.loss.teacher_temp": 0.061}, {"method.loss.teacher_temp": 0.06}),
    (
        "hot_start",
        {"method.loss.teacher_temp": 0.07, "method.loss.warmup_teacher_temp": 0.061, **WARM},
        {"method.loss.teacher_temp": 0.07, "method.loss.warmup_teacher_temp": 0.06, **WARM},
    ),
    ("hot_teacher", {"method.loss.teacher_temp": 0.071, **WARM}, {"method.loss.teacher_temp": 0.07, **WARM}),
    (
        "hot_teacher",
        {"method.loss.teacher_temp": 0.08, "method.loss.warmup_teacher_temp": 0.06, **WARM},
        {"method.loss.teacher_temp": 0.08, "method.loss.warmup_teacher_temp": 0.061, **WARM},
    ),
    ("cold_teacher", {"method.loss.teacher_temp": 0.02}, {"method.loss.teacher_temp": 0.021}),
    (
        "unused_warmup_temp",
        {"method.loss.warmup_teacher_temp": 0.0005},
        {"method.loss.warmup_teacher_temp": 0.0005, **WARM},
    ),
    (
        "unused_warmup_temp",
        {"method.loss.warmup_teacher_temp": 0.03},
        {"method.loss.warmup_teacher_temp": 0.03, "method.loss.teacher_temp": 0.03},
    ),
    ("no_sharpening", {"method.loss.sharpening": False}, {"method.loss.sharpening": True}),
    ("student_not_softer", {"method.loss.student_temp": 0.04}, {"method.loss.student_temp": 0.041}),
    (
        "student_not_softer",
        {"method.loss.student_temp": 0.06, "method.loss.warmup_teacher_temp": 0.06, **WARM},
        {"method.loss.student_temp": 0.06, "method.loss.warmup_teacher_temp": 0.06},
    ),
    ("soft_student", {"method.loss.student_temp": 0.2}, {"method.loss.student_temp": 0.19}),
    ("no_centering", {"method.operation.kind": "none"}, {"method.operation.center_momentum": 0.0}),
    ("no_centering", {"method.operation.kind": "none"}, {"method.operation.kind": "softmax_batch"}),
    (
        "no_centering",
        {"method.operation.kind": "none"},
        {"method.operation.kind": "none", "method.loss.kind": "mse"},
    ),
    ("slow_center", {"method.operation.center_momentum": 0.999}, {"method.operation.center_momentum": 0.998}),
    ("slow_center", {"method.operation.center_momentum": 1.0}, {"method.operation.center_momentum": 0.9}),
    ("center_behind_run", {"method.operation.center_momentum": 0.981}, {"method.operation.center_momentum": 0.98}),
    ("center_behind_run", {"method.operation.center_momentum": 0.98, "epochs": 1}, SINKHORN),
    ("no_momentum_teacher", _teacher(0.9), _teacher(0.91)),
    ("no_momentum_teacher", {"method.teacher.kind": "student_copy"}, {"method.teacher.kind": "previous_epoch"}),
    ("no_momentum_teacher", {"method.teacher.kind": "previous_iteration"}, {"method.teacher.kind": "momentum"}),
    ("no_momentum_evened", {"method.teacher.kind": "student_copy", **SINKHORN}, SINKHORN),
    ("few_targets_evened", {"method.head.out_dim": 1025, **SINKHORN}, {"method.head.out_dim": 1024, **SINKHORN}),
    (
        "few_targets_evened",
        {"method.head.out_dim": 1024, "accumulation_steps": 2, **SINKHORN},
        {"accumulation_steps": 2},
    ),
    ("few_targets_evened", SWAV | {"method.prototypes_number": 513}, SWAV),
    ("few_targets_evened", SWAV | {"accumulation_steps": 2}, SWAV | {"accumulation_steps": 1}),
    (
        "few_targets_evened",
        SWAV | {"method.prototypes_number": 545, "method.queue_size": 1, "method.queue_start_epochs": 1.0},
        SWAV | {"method.prototypes_number": 544, "method.queue_size": 1, "method.queue_start_epochs": 1.0},
    ),
    ("no_temperatures", {"method.loss.kind": "mse"}, {"method.loss.kind": "info_nce"}),
    ("no_temperatures", {"method.loss.kind": "cosine"}, {"method.loss.kind": "cross_entropy"}),
    (
        "nothing_against_constant",
        {"method.loss.kind": "mse", "method.operation.kind": "none"},
        {"method.loss.kind": "mse"},
    ),
    (
        "nothing_against_constant",
        {"method.loss.kind": "mse", "method.operation.kind": "none"},
        {"method.loss.kind": "mse", "method.operation.kind": "none", "method.predictor.kind": "mlp"},
    ),
    ("nothing_against_constant", {**BYOL, "method.predictor.kind": "none"}, BYOL),
    ("deep_plain_head", {**MLP, "method.head.layers_number": 3}, {**MLP, "method.head.layers_number": 2}),
    ("last_layer_held", {"method.head.freeze_last_layer_epochs": 1.1}, {"method.head.freeze_last_layer_epochs": 1.0}),
    ("last_layer_held", SWAV | {"method.freeze_prototypes_epochs": 1.1}, SWAV),
    ("free_lengths", BASE, BASE | {"backbone.name": "vit_small_patch16_224"}),
    ("free_lengths", BASE, BASE | {"method.head.norm_last_layer": True}),
    (
        "predictor_on_dino",
        {"method.predictor.kind": "mlp"},
        {"method.predictor.kind": "mlp", "method.loss.kind": "mse"},
    ),
    ("narrow_two_crops", TWO_CROPS, TWO_CROPS | WIDE),
    ("narrow_two_crops", TWO_CROPS | {"crops.global_1.scale": [0.14, 1.0]}, {"crops.local_crops_number": 1}),
    ("overlapping_scales", {"crops.local.scale": [0.15, 0.41]}, {"crops.local.scale": [0.15, 0.4]}),
    ("overlapping_scales", {"crops.global_2.scale": [0.3, 1.0]}, {"crops.global_2.scale": [0.3, 1.0], **TWO_CROPS}),
    ("byol_local_crops", BYOL, BYOL | TWO_CROPS),
    ("gray_crops", {"crops.local.grayscale_probability": 0.1}, {"crops.local.grayscale_probability": 0.1, **TWO_CROPS}),
    (
        "gray_crops",
        {"crops.global_2.grayscale_probability": 0.1},
        {"crops.global_2.grayscale_probability": 0.1, "data.class_factor": "shape"},
    ),
    (
        "strong_blur",
        BLURRED | {"crops.local.blur_sigma": [0.1, 0.34]},
        BLURRED | {"crops.local.blur_sigma": [0.1, 1 / 3]},
    ),
    ("strong_blur", BLURRED | {"crops.local.blur_sigma": [0.1, 2.0]}, {"crops.local.blur_sigma": [0.1, 2.0]}),
    ("high_lr", {"optimizer.lr": 0.065}, {"optimizer.lr": 0.063}),
    (
        "high_lr",
        {"optimizer.lr": 0.0041, "optimizer.lr_scaling": "none"},
        {"optimizer.lr": 0.065, "optimizer.kind": "sgd"},
    ),
    ("low_lr", {"optimizer.lr": 0.0015}, {"optimizer.lr": 0.0017}),
    ("long_warmup", {"optimizer.warmup_epochs": 1.1}, {"optimizer.warmup_epochs": 1.0}),
    ("long_warmup", {"method.loss.warmup_teacher_temp_epochs": 2}, WARM),
    (
        "falling_weight_decay",
        {"optimizer.weight_decay": 0.04, "optimizer.weight_decay_end": 0.03},
        {"optimizer.weight_decay": 0.04, "optimizer.weight_decay_end": 0.04},
    ),
    ("bf16_small_patch", {"precision": "bf16"}, {"precision": "bf16", "backbone.patch_size": 16}),
    (
        "bf16_small_patch",
        {"precision": "bf16", "backbone.name": "vit_small_patch8_224"},
        {"precision": "bf16", "backbone.name": "resnet18"},
    ),
    ("bf16_unclipped", {"precision": "bf16", "optimizer.clip_grad": 0.0}, {"optimizer.clip_grad": 0.0}),
    ("teacher_behind_run", _teacher(0.9921), _teacher(0.992)),
    ("teacher_behind_run", _teacher(1.0), {"method.teacher.kind": "previous_epoch"}),
    ("teacher_halts", _teacher(0.98, 1.0), _teacher(0.98, 0.999)),
    ("teacher_halts", _teacher(0.98, 1.0), _teacher(1.0)),
    ("teacher_halts", _teacher(0.98, 1.0) | {"epochs": 8}, _teacher(0.98, 1.0) | {"epochs": 9}),
    ("small_batch_momentum", {"epochs": 32}, {"epochs": 31}),
    ("small_batch_momentum", {"epochs": 32} | _teacher(0.9994), {"epochs": 32} | _teacher(0.9995)),
    ("small_batch_momentum", {"epochs": 600, "batch_size": 256}, {"epochs": 600, "batch_size": 257}),
    ("many_prototypes", {"method.head.out_dim": 4001}, {"method.head.out_dim": 4000}),
    (
        "many_prototypes",
        {"method.head.out_dim": 4001},
        {"method.head.out_dim": 4001, "method.loss.kind": "mse"},
    ),
    ("many_prototypes", SWAV | {"method.prototypes_number": 4001}, SWAV | {"method.prototypes_number": 4000}),
    (
        "long_queue",
        {"method.kind": "moco", "method.queue_size": 8001},
        {"method.kind": "moco", "method.queue_size": 8000},
    ),
]


def shapes(changes: Changes) -> Trial:
    return BASELINES["shapes_cpu"].but(changes)


def found(changes: Changes, images: int | None = IMAGES) -> dict[str, Finding]:
    return {finding.rule: finding for finding in lint.lint(shapes(changes), train_images=images)}


# ------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(("rule", "broken", "kept"), CASES)
def test_rule_is_broken_at_its_bound_and_not_next_to_it(rule: str, broken: Changes, kept: Changes) -> None:
    assert rule in found(broken)
    assert rule not in found(kept)


def test_every_rule_is_tested_and_bears_its_functions_name() -> None:
    names = [rule.__name__ for rule in (*lint.RULES, *lint.RULES_ON_IMAGES)]
    assert {rule for rule, _, _ in CASES} == set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("rule", "broken", "kept"), CASES)
def test_finding_names_knobs_of_the_trial_as_they_are_and_its_source(rule: str, broken: Changes, kept: Changes) -> None:
    finding = found(broken)[rule]
    assert finding.knobs
    assert finding.knobs.items() <= shapes(broken).flat().items()
    # Of what was changed at least one is to blame.
    assert finding.knobs.keys() & broken.keys()
    assert finding.source


def test_warnings_come_before_notes() -> None:
    severities = [each.severity for each in lint.lint(shapes({**TWO_CROPS, "epochs": 1}), train_images=IMAGES)]
    assert severities == sorted(severities, reverse=True)
    assert set(severities) == {"warning", "note"}


@pytest.mark.parametrize(("images", "severity"), [(255, "note"), (26, "note"), (25, "warning")])
def test_prototypes_far_beyond_the_images_are_warned_of(images: int, severity: str) -> None:
    assert found({}, images)["many_prototypes"].severity == severity


def test_without_a_number_of_images_nothing_is_said_of_the_run() -> None:
    slow = _teacher(1.0) | {"method.operation.center_momentum": 0.99, "method.head.out_dim": 100_000}
    assert {"teacher_behind_run", "center_behind_run", "many_prototypes"} <= found(slow).keys()
    assert not found(slow, None)


@pytest.mark.parametrize(("held", "part"), [(1.1, "more than half"), (2.0, "all")])
def test_a_layer_that_is_held_throughout_is_told_from_one_held_for_long(held: float, part: str) -> None:
    reason = found({"method.head.freeze_last_layer_epochs": held})["last_layer_held"].reason
    assert f"held for {held:g} of 2 epochs, {part} of the run" in reason


def test_fewer_images_than_a_batch_make_no_step() -> None:
    assert "many_prototypes" in found({}, 16)
    assert not found({}, 15)


def test_a_slow_center_is_found_once() -> None:
    assert "center_behind_run" not in found({"method.operation.center_momentum": 0.999})


def test_a_longer_run_leaves_room_for_a_slower_center_and_teacher() -> None:
    slow = {"method.operation.center_momentum": 0.99} | _teacher(0.996)
    assert {"center_behind_run", "teacher_behind_run"} <= found(slow).keys()
    assert not {"center_behind_run", "teacher_behind_run"} & found({**slow, "epochs": 8}).keys()


def test_knob_is_that_of_the_name_where_no_patch_size_is_set() -> None:
    finding = found({"precision": "bf16", "backbone.name": "vit_small_patch8_224"})["bf16_small_patch"]
    assert finding.knobs == {"precision": "bf16", "backbone.name": "vit_small_patch8_224"}


# ----------------------------------------------------------------------------------------------- where they apply


# Broken by knobs that every method has.
SHARED: Changes = {
    "precision": "bf16",
    "optimizer.clip_grad": 0.0,
    "optimizer.lr": 1.0,
    "optimizer.weight_decay": 1.0,
    "optimizer.weight_decay_end": 0.0,
    "optimizer.warmup_epochs": 2.0,
    "crops.local.scale": [0.15, 0.9],
    **views.of(views.ALL, {"blur_probability": 0.5, "blur_sigma": [0.1, 2.0], "grayscale_probability": 0.2}),
}
OF_ALL = {"bf16_small_patch", "bf16_unclipped", "falling_weight_decay", "gray_crops", "long_warmup", "strong_blur"}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ({"method.kind": "supervised"}, set()),
        ({"method.kind": "distillation", "method.checkpoint": "file"}, set()),
        ({"method.kind": "mae"}, set()),
        ({"method.kind": "masked"}, set()),
        ({"method.kind": "byol"}, {"byol_local_crops", "overlapping_scales"}),
        ({"method.kind": "moco"}, {"overlapping_scales", "long_queue"}),
        (SWAV, {"overlapping_scales"}),
        ({"method.kind": "dino"}, {"overlapping_scales", "high_lr"}),
    ],
    ids=lambda value: value["method.kind"] if isinstance(value, dict) else "",
)
def test_rules_are_silent_where_the_method_has_not_their_knobs(method: Changes, more: set[str]) -> None:
    assert found({**SHARED, **method}).keys() == OF_ALL | more


def test_masked_prediction_has_the_temperatures_and_the_center_of_dino() -> None:
    changes = {"method.kind": "masked", "method.loss.teacher_temp": 0.3, "method.operation.center_momentum": 0.999}
    assert {"hot_start", "student_not_softer", "slow_center"} <= found(changes).keys()


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_break_no_rule(name: str) -> None:
    assert lint.lint(BASELINES[name], train_images=1_281_167) == []


def test_the_default_baseline_breaks_no_rule() -> None:
    assert found({}) == {}
    assert lint.about_train_images(BASELINES["shapes_cpu"]) == IMAGES


# -------------------------------------------------------------------------------------------------- what they say


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    """One of each rule."""
    return [found(broken)[rule] for rule, broken, _ in CASES]


def test_accuracies_seen_here_are_in_the_lab_book(findings: list[Finding]) -> None:
    book = (LAB_BOOK / "README.md").read_text()
    numbers = {(each.rule, number) for each in findings for number in re.findall(r"\b\d\d\.\d\b", each.seen_here)}
    assert len(numbers) > 40
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number[1])}(?!\d)", book)] == []


def test_accuracies_of_the_paper_are_in_its_tables(findings: list[Finding]) -> None:
    with (LAB_BOOK / "published" / "dino_paper.csv").open() as file:
        published = {row["value"] for row in csv.DictReader(file)}
    numbers = {number for each in findings for number in re.findall(r"\b\d\d\.\d\b", each.reason)}
    assert len(numbers) > 10
    assert numbers <= published


# -------------------------------------------------------------------------------------------------- rows and data


def test_equal_findings_are_told_once_with_their_rows_in_turn() -> None:
    hot, hotter = ({"method.loss.teacher_temp": temp} for temp in (0.08, 0.09))
    rows = [("a", hot), ("b", hotter), ("c", hot), ("a", hot | {"seed": 1})]
    told = lint.over_rows([(label, shapes(changes | TWO_CROPS), IMAGES) for label, changes in rows])
    assert [(each.finding.rule, each.rows) for each in told] == [
        ("hot_start", ("a", "c")),
        ("hot_start", ("b",)),
        ("narrow_two_crops", ("a", "b", "c")),
    ]


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 4000),
        ({"data.fraction": 0.05}, 200),
        ({"data.kind": "digits"}, 1437),
        ({"data.evaluation_split": "held_out"}, None),
        ({"data.classes": ["red", "green"]}, None),
        ({"data.kind": "imagefolder", "data.root": "nowhere"}, None),
    ],
)
def test_images_are_counted_where_nothing_must_be_read(changes: Changes, images: int | None) -> None:
    assert lint.about_train_images(shapes(changes)) == images


# ------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


def test_plan_shows_each_finding_with_its_rows_source_and_what_was_seen(invoke: Callable[..., Result]) -> None:
    shown = " ".join(invoke("plan", "collapse", "--seeds", "0,1").stdout.split())
    assert "warning no_sharpening row centring only: method.loss.sharpening = false" in shown
    assert "warning no_centering row sharpening only:" in shown
    assert "source: Section 5.3 and Figure 7 here: Holds: uniform in 3 seeds of 3" in shown
    assert shown.count("no_sharpening") == 1


def test_plan_says_all_rows_of_what_all_share_and_shows_brackets(invoke: Callable[..., Result]) -> None:
    shown = " ".join(invoke("plan", "batch_size", "--seeds", "0").stdout.split())
    assert "note narrow_two_crops all rows: crops.local_crops_number = 0, crops.global_1.scale = [0.4, 1.0]," in shown


def test_plan_is_silent_where_nothing_is_found(invoke: Callable[..., Result]) -> None:
    assert "known to go wrong" not in invoke("plan", "epochs", "--seeds", "0").stdout


def test_plan_as_json_holds_findings_as_data(invoke: Callable[..., Result]) -> None:
    told = json.loads(invoke("plan", "collapse", "--json").stdout)["findings"]
    assert [(each["rule"], each["rows"]) for each in told] == [
        ("no_sharpening", ["centring only"]),
        ("no_centering", ["sharpening only"]),
    ]
    assert told[0]["knobs"] == {"method.loss.sharpening": False, "method.loss.student_temp": 0.1}
    assert told[0].keys() == {"rule", "severity", "knobs", "reason", "source", "seen_here", "rows"}


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "collapse", "--strict"),
        ("plan", "collapse", "--strict", "--json"),
        ("run", "collapse", "--strict"),
        ("train", "--strict", "--set", "method.loss.sharpening=false", "--set", "method.operation.kind=none"),
    ],
)
def test_strict_refuses_warnings_by_name_and_starts_nothing(
    invoke: Callable[..., Result], tmp_path: Path, command: tuple[str, ...]
) -> None:
    refused = invoke(*command)
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert "the linter warns of no_sharpening, no_centering" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_strict_lets_notes_pass(invoke: Callable[..., Result]) -> None:
    assert invoke("plan", "batch_size", "--strict").exit_code == 0


def test_train_tells_findings_before_it_starts(invoke: Callable[..., Result]) -> None:
    shown = invoke("train", "--baseline", "smoke", "--set", "epochs=1").stdout
    assert shown.index("many_prototypes") < shown.index("step 0")
    assert "row" not in shown[: shown.index("step 0")]


def test_images_in_files_are_counted_once_they_have_been_read(invoke: Callable[..., Result], tmp_path: Path) -> None:
    for split, number in (("train", 8), ("val", 2)):
        (tmp_path / "pets" / split).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (20 + i, 30), (30 * i, 99, 0)).save(tmp_path / "pets" / split / f"{i}.png")
    files = ["--baseline", "smoke", "--set", "data.kind=imagefolder", "--set", "data.root=pets", "--strict"]
    # Enough steps and prototypes that the number of images alone is to blame.
    files += ["--set", "epochs=400", "--set", "method.head.out_dim=81", "--set", "batch_size=8"]
    refused = invoke("train", *files)
    assert refused.exit_code == 2
    assert "the linter warns of many_prototypes;" in refused.stderr
    assert not (tmp_path / "lab" / "trials").exists()
