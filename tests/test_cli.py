import importlib
import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from dino_lab import asking, cli, terminal
from dino_lab.orchestration.runner import Progress, Summary
from dino_lab.orchestration.status import TrialStatus

ROOT = Path(__file__).parents[1]
SMOKE = ["--baseline", "smoke", "--seeds", "0"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def answer(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


# ------------------------------------------------------------------- quick


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["run", "--help"], set()),
        (["list"], set()),
        (["list", "--json"], set()),
        (["plan", "colapse"], set()),
        (["plan", "collapse"], {"torch", "torchvision"}),
        (["status", "collapse"], {"torch", "torchvision"}),
    ],
    # A set's order differs between processes, and xdist wants the same names in each.
    ids=lambda value: " ".join(sorted(value) if isinstance(value, set) else value),
)
def test_command_imports_nothing_heavy_that_it_does_not_need(arguments: list[str], allowed: set[str]) -> None:
    code = (
        f"import sys; sys.argv = ['dino-lab', *{arguments}]\n"
        "from dino_lab.cli import main\n"
        "try: main()\n"
        "finally: print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    heavy = {"torch", "torchvision", "timm", "ray", "mlflow", "pandas", "matplotlib", "sklearn", "scipy"}
    assert "typer" in run.stderr.splitlines()[-1].split()
    assert set(run.stderr.splitlines()[-1].split()) & heavy <= allowed


def test_names_read_without_importing_are_those_that_importing_finds() -> None:
    assert asking.baselines() == list(importlib.import_module("experiments.baselines").BASELINES)
    assert asking.DEFAULT_BASELINE in asking.baselines()
    for name, note in asking.experiments().items():
        experiment = importlib.import_module(f"experiments.{name}")
        assert hasattr(experiment, "ABLATION") != hasattr(experiment, "SEARCH")
        assert note
        assert note.split() == (experiment.__doc__ or "").split()


def test_switches_of_the_environment_win_over_the_offline_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch in cli.OFFLINE:
        monkeypatch.setenv(switch, "theirs")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(sys, "argv", ["dino-lab", "list"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert {switch: os.environ[switch] for switch in cli.OFFLINE} == {
        switch: "1" if switch == "HF_HUB_OFFLINE" else "theirs" for switch in cli.OFFLINE
    }


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "colapse"], "unknown experiment 'colapse'; did you mean 'collapse'? known: attention, "),
        (["run", "nothing-like-it"], "unknown experiment 'nothing-like-it'; known: attention, "),
        (["run", "baselines"], "unknown experiment 'baselines'"),
        (["run", "collapse", "--baseline", "smke"], "unknown baseline 'smke'; did you mean 'smoke'? known: "),
        (["status", "collapse", "--set", "method.techer_temp=1"], "did you mean 'method.loss.teacher_temp'?"),
        (["run", "collapse", "--set", "method.loss.teacher_temp=-1"], "method.loss.teacher_temp = -1"),
        (["run", "collapse", "--set", "method.loss.teacher_temp=hot"], "method.loss.teacher_temp = 'hot'"),
        (["train", "--set", "method.loss.teacher_temp"], "must be knob=value"),
        (["train", "--set", "=1"], "must be knob=value"),
        (["train", "--set", "runtime.gpus=1"], "runtime.device is 'cpu'"),
        (["train", "--set", "backbone.name=vit_tny_patch16_224"], "did you mean vit_tiny_patch16_224"),
        (["run", "collapse", "--set", "backbone.name=vit_tny_patch16_224"], "did you mean vit_tiny_patch16_224"),
        (["run", "collapse", "--seeds", "0,one"], "--seeds '0,one': must be whole numbers"),
        (["run", "collapse", "--seeds", "0,0"], "a seed is given twice"),
        (["run", "collapse", "--seeds=-1"], "seed = -1"),
        (["run", "collapse", "--lab", "file"], "--lab file: not a folder"),
        (["demo", "--lab", "no/such/lab"], "--lab no/such/lab: there is no folder"),
        (["report", "collapse"], "no records in lab"),
        (["ui"], "no records in lab"),
        (["report", "collapse", "--tracking-uri", "ftp://me:secret@there"], "ftp://me:***@there: must begin with"),
        (["ui", "--tracking-uri", "sqlite:///no.db"], "from sqlite:///no.db: (sqlite3.OperationalError) unable to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_ends_with_one_message_and_starts_nothing(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "file").touch()
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("dino_lab: ")
    assert message in result.stderr
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_the_next_command_is_told_the_store_but_neither_a_password_nor_what_it_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = "postgresql://me:secret@there/db"
    assert cli._store_option(None) == []
    assert cli._store_option(uri) == ["--tracking-uri", "postgresql://me:***@there/db"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert cli._store_option(uri) == []


def test_every_wrong_knob_is_named() -> None:
    result = invoke("plan", "collapse", "--set", "method.techer_temp=1", "--set", "haed.out_din=2")
    assert "'method.techer_temp'" in result.stderr
    assert "'haed.out_din'" in result.stderr


def test_unknown_command_is_told_its_neighbour() -> None:
    result = invoke("plna")
    assert result.exit_code == 2
    assert "Did you mean 'plan'?" in result.stderr


def test_lab_that_cannot_be_written_to_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match="cannot be written to"):
        asking.check_lab(folder / "lab")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.06", 0.06),
        ("false", False),
        ("null", None),
        ("[0.15, 0.4]", [0.15, 0.4]),
        ("digits", "digits"),
        ('"7"', "7"),
        ("a=b", "a=b"),
    ],
)
def test_value_of_set_is_json_or_else_a_string(text: str, value: object) -> None:
    assert asking.parse_changes([f"knob={text}"]) == {"knob": value}


# ------------------------------------------------------------------- facts


def test_list_as_json_holds_experiments_with_docstrings_and_baselines() -> None:
    facts = json.loads(answer("list", "--json"))
    assert facts == {"experiments": asking.experiments(), "baselines": asking.baselines()}


def test_plan_as_json_holds_every_trial_and_what_its_row_changes() -> None:
    facts = json.loads(answer("plan", "collapse", "--baseline", "smoke", "--seeds", "4,5", "--json"))
    assert [row["row"] for row in facts["rows"]] == ["both", "centring only", "sharpening only"]
    assert facts["rows"][1]["changes"] == {"method.loss.sharpening": False}
    assert facts["rows"][1]["implied"] == {}
    assert [(trial["row"], trial["seed"]) for trial in facts["trials"]] == [
        (row["row"], seed) for seed in (4, 5) for row in facts["rows"]
    ]
    assert len({trial["trial_id"] for trial in facts["trials"]}) == facts["left"] == 6


def test_set_changes_the_identity_of_every_trial() -> None:
    plain = json.loads(answer("plan", "collapse", *SMOKE, "--json"))["trials"]
    changed = json.loads(answer("plan", "collapse", *SMOKE, "--set", "method.head.out_dim=16", "--json"))["trials"]
    assert not {trial["trial_id"] for trial in plain} & {trial["trial_id"] for trial in changed}


def test_plan_shows_changes_as_set_takes_them_and_the_next_command() -> None:
    shown = answer("plan", "collapse", *SMOKE, "--lab", "my lab")
    assert "method.loss.sharpening = false" in shown
    assert shown.endswith("run collapse --baseline smoke --seeds 0 --lab 'my lab'\n")


def test_a_trial_is_explained_in_words_as_facts_and_by_a_picture(tmp_path: Path) -> None:
    told = answer("train", "--baseline", "smoke", "--set", "epochs=1")
    trial = told.split()[1].rstrip(",")
    said = answer("explain", trial)
    assert said.splitlines()[0].startswith(f"trial {trial}: ")
    assert Path(said.splitlines()[-1]).read_bytes().startswith(b"\x89PNG")
    facts = json.loads(answer("explain", trial, "--json"))
    assert (facts["trial_id"], facts["state"], facts["step"]) == (trial, "finished", 4)
    assert facts["picture"] == said.splitlines()[-1]


def test_what_a_trial_shows_of_images_is_drawn_and_what_it_cannot_show_is_said(tmp_path: Path) -> None:
    trial = answer("train", "--baseline", "smoke", "--set", "epochs=1").split()[1].rstrip(",")
    supervised = ("--set", "epochs=1", "--set", "method.kind=supervised")
    other = answer("train", "--baseline", "smoke", *supervised).split()[1].rstrip(",")
    drawn = [Path(line) for line in answer("look", trial, other).splitlines()]
    assert [path.name for path in drawn] == ["attention.png", "prototypes.png", "classes.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert "no picture of prototypes: " in answer("look", other)
    lab = drawn[0].parents[2]
    for content, told in ((b"torn", "cannot be read"), (None, "has no checkpoint yet")):
        for checkpoint in lab.glob("trials/*/checkpoint.pt"):
            checkpoint.write_bytes(content) if content else checkpoint.unlink()
        refused = invoke("look", trial, other)
        assert (refused.exit_code, refused.stdout.count(told)) == (1, 3)
        assert not any(path.exists() for path in drawn)


def test_a_log_of_others_is_diagnosed(tmp_path: Path) -> None:
    log = tmp_path / "others.csv"
    log.write_text("epoch,loss\n" + "".join(f"{epoch},11.0902\n" for epoch in range(20)))
    said = answer("diagnose", str(log))
    assert said.splitlines()[0] == f"{log}: uniform from epoch 0 (0 %)"
    assert json.loads(answer("diagnose", str(log), "--out-dim", "65536", "--json"))["out_dim_is"] == "asked for"


def test_trial_is_trained_once_and_then_known_to_plan_and_status() -> None:
    first = answer("train", "--baseline", "smoke", "--set", "epochs=1")
    assert "step 0  epoch 0.00" in first
    assert first.splitlines()[-1].startswith("finished after")
    assert "\nstep " not in answer("train", "--baseline", "smoke", "--set", "epochs=1")

    options = [*SMOKE, "--set", "epochs=1", "--json"]
    plan = json.loads(answer("plan", "collapse", *options))
    assert plan["left"] == 2
    assert plan["seconds_left"] == pytest.approx(2 * plan["trials"][0]["seconds"])
    status = json.loads(answer("status", "collapse", *options))
    assert [trial["state"] for trial in status["trials"]] == ["finished", "waiting", "waiting"]
    counts = status["counts"]
    assert (counts["finished"], counts["waiting"], counts["running"], counts["failed"]) == (1, 2, 0, 0)
    pace = 60 * status["trials"][0]["train_minutes"]  # of one epoch
    besides = status["trials"][0]["seconds"] / pace
    assert status["seconds_left"] == pytest.approx(2 * pace * besides)


def test_checkpoints_of_finished_trials_are_deleted_when_that_is_wanted_and_records_never(folder: Path) -> None:
    options = [*SMOKE, "--set", "epochs=1"]
    assert "no checkpoints of finished trials" in answer("prune", "collapse", *options)
    answer("train", *options[:2], *options[-2:])
    (checkpoint,) = folder.glob("lab/trials/*/checkpoint.pt")
    before = {path.name for path in checkpoint.parent.iterdir()}
    asked = CliRunner().invoke(cli.app, ["prune", "collapse", *options], input="n\n")
    assert "1 checkpoints of finished trials" in asked.output
    assert checkpoint.exists()
    answer("prune", "collapse", *options, "--yes")
    assert {path.name for path in checkpoint.parent.iterdir()} == before - {"checkpoint.pt"}
    assert json.loads(answer("status", "collapse", *options, "--json"))["counts"]["finished"] == 1


def test_sync_brings_mlflow_up_to_the_journals_without_a_run(folder: Path) -> None:
    options = [*SMOKE, "--set", "epochs=1"]
    answer("train", *options[:2], *options[-2:])
    assert "MLflow has every record of 3 trials" in answer("sync", "collapse", *options)
    assert "MLflow has every record of 3 trials" in answer("sync", "collapse", *options)
    assert "both" in answer("report", "collapse", *options)


def test_there_is_nothing_to_stop_where_nothing_runs(folder: Path) -> None:
    stopped = invoke("stop", "collapse")
    assert (stopped.exit_code, stopped.stderr) == (2, "dino_lab: no run of collapse in lab\n")


# -------------------------------------------------------------------- data


@pytest.fixture
def photographs(folder: Path) -> Path:
    """Two classes of eight pictures to train on, of two to judge by."""
    for split, number in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            (folder / "pets" / split / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (20 + i, 30), (30 * i, 99, 0)).save(folder / "pets" / split / name / f"{i}.png")
    return folder / "pets"


FILES = ["--baseline", "smoke", "--set", "data.kind=imagefolder", "--set", "data.root=pets"]


def test_data_as_json_tells_splits_classes_and_where_the_sheet_is(photographs: Path) -> None:
    told = json.loads(answer("data", "imagefolder", *FILES, "--json"))
    assert {role: (of["split"], of["images"]) for role, of in told["splits"].items()} == {
        "training": ("train", 16),
        "neighbours": ("bank", 16),
        "evaluation": ("test", 4),
    }
    assert told["class_counts"]["training"] == {"cat": 8, "dog": 8}
    assert told["skipped"] == {}
    with Image.open(told["sheet"]) as sheet:
        assert sheet.height > 8 * 100


def test_data_shows_what_could_not_be_decoded(photographs: Path) -> None:
    (photographs / "train" / "cat" / "notes.txt").write_text("no image")
    stopped = invoke("data", "imagefolder", *FILES)
    assert stopped.exit_code == 2
    assert "1 of 17 images in pets/train cannot be decoded" in stopped.stderr
    assert "train/cat/notes.txt" in stopped.stderr
    shown = answer("data", "imagefolder", *FILES, "--set", "data.bad_images=skip")
    assert "1 images are left out:\ntrain/cat/notes.txt: cannot be decoded: no image that PIL knows" in shown


def test_nothing_is_downloaded_unless_it_is_asked_for(folder: Path) -> None:
    for command in (["data", "cifar10"], ["train", *SMOKE[:2], "--set", "data.kind=cifar10"]):
        missing = invoke(*command)
        assert missing.exit_code == 2
        assert "data.kind = 'cifar10'" in missing.stderr
        assert "`--download` fetches it" in missing.stderr
        assert str(folder / "lab" / "data" / "downloads") in missing.stderr
    assert not (folder / "lab" / "trials").exists()


def test_a_plan_needs_no_data_and_says_that_its_ids_are_not_known(folder: Path) -> None:
    plan = invoke("plan", "collapse", "--baseline", "imagenet_vits16", "--json")
    assert plan.exit_code == 0
    assert "ids of trials are not known before their images are read: data.root = 'imagenet'" in plan.stderr
    assert len(json.loads(plan.stdout)["rows"]) == 3


def test_looking_reads_no_image(photographs: Path, folder: Path) -> None:
    for command in ("plan", "status"):
        seen = invoke(command, "collapse", "--seeds", "0", *FILES)
        assert seen.exit_code == 0
        assert "16 images have not been read yet; run, train and data do it" in seen.stderr
    assert not any((folder / "lab").glob("data/imagefolder*"))


def test_moved_images_are_the_same_trial_and_lost_ones_are_found_by_their_digest(
    photographs: Path, folder: Path
) -> None:
    known = answer("train", *FILES, "--set", "epochs=1", "--set", "optimizer.warmup_epochs=1")
    photographs.rename(folder / "elsewhere")
    moved = [word.replace("data.root=pets", "data.root=elsewhere") for word in FILES]
    again = answer("train", *moved, "--set", "epochs=1", "--set", "optimizer.warmup_epochs=1")
    (trial,) = (folder / "lab" / "trials").iterdir()
    assert trial.name in known.splitlines()[0]
    assert trial.name in again.splitlines()[0]
    digest = json.loads((trial / "trial.json").read_text())["data"]["digest"]
    plan = ["plan", "collapse", "--seeds", "0", "--json"]
    there = json.loads(answer(*plan, *moved))["trials"]
    lost = json.loads(answer(*plan, *FILES, "--set", f"data.digest={digest}"))["trials"]
    assert [trial["trial_id"] for trial in lost] == [trial["trial_id"] for trial in there]


def test_a_batch_larger_than_the_images_is_refused_before_any_trial(photographs: Path, folder: Path) -> None:
    refused = invoke("run", "collapse", *SMOKE, *FILES[2:], "--set", "batch_size=32")
    assert refused.exit_code == 2
    assert "batch_size = 32: exceeds the 16 images of data" in refused.stderr
    assert not (folder / "lab" / "trials").exists()


def test_what_is_wrong_with_the_images_that_are_judged_names_their_section(folder: Path) -> None:
    refused = invoke("train", *SMOKE[:2], "--set", "evals.data.kind=cifar10")
    assert refused.exit_code == 2
    assert "in evals.data: data.kind = 'cifar10'" in refused.stderr


def test_a_trial_of_other_images_is_another_trial(photographs: Path, folder: Path) -> None:
    def trained() -> set[str]:
        answer("train", *FILES, "--set", "epochs=1", "--set", "optimizer.warmup_epochs=1")
        return {path.name for path in (folder / "lab" / "trials").iterdir()}

    first = trained()
    assert len(first) == 1
    assert trained() == first
    plan = ["plan", "collapse", "--baseline", "smoke", "--seeds", "0", *FILES[2:], "--json"]
    before = json.loads(answer(*plan))["trials"]
    Image.new("RGB", (20, 30), "white").save(photographs / "train" / "cat" / "0.png")
    assert len(trained()) == 2
    after = json.loads(answer(*plan))["trials"]
    assert all(a["trial_id"] != b["trial_id"] for a, b in zip(before, after, strict=True))


def test_a_trained_trial_is_exported_in_both_layouts_and_never_written_over(folder: Path) -> None:
    invoke("train", "--baseline", "smoke", "--set", "epochs=1")
    (trial,) = (path.name for path in (folder / "lab/trials").iterdir())
    files = answer("export", trial).splitlines()
    assert [Path(file).name for file in files] == ["config.json", "model.safetensors"]
    assert answer("export", trial, "--format", "official", "--to", "here.pth").strip() == "here.pth"
    assert torch.load(folder / "here.pth", weights_only=True)["epoch"] == 1
    again = invoke("export", trial)
    assert again.exit_code == 2
    assert "exists; it is not written over" in again.stderr


def test_an_export_of_a_trial_that_is_not_there_is_refused(folder: Path) -> None:
    assert "no trials in lab/trials" in invoke("export", "0123456789").stderr
    invoke("train", "--baseline", "smoke", "--set", "epochs=1")
    (trial,) = (path.name for path in (folder / "lab/trials").iterdir())
    assert f"did you mean {trial!r}?" in invoke("export", trial[:-1] + "x").stderr
    (folder / "lab/trials" / trial / "checkpoint.pt").write_bytes(b"half a checkpoint")
    broken = invoke("export", trial)
    assert broken.exit_code == 2
    assert "cannot be read" in broken.stderr
    (folder / "lab/trials" / trial / "trial.json").write_text('{"seed"')
    assert f"lab/trials/{trial}/trial.json: is damaged" in invoke("export", trial).stderr


def test_doctor_as_json_says_what_was_found() -> None:
    findings = json.loads(invoke("doctor", "--json").stdout)
    assert {finding["state"] for finding in findings} <= {"ok", "warn", "fail"}
    assert {"Python", "processors", "memory", "disk", "torch", "GPU", "lab lab"} <= {f["what"] for f in findings}


def test_doctor_fails_where_no_lab_can_be(folder: Path) -> None:
    (folder / "file").touch()
    result = invoke("doctor", "--lab", "file")
    assert result.exit_code == 1
    assert "fail" in result.stdout


def test_arguments_of_test_go_to_pytest() -> None:
    command = [sys.executable, "-m", "dino_lab", "test", "--collect-only", "-q", "tests/test_lock.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "test_lock_names_no_address" in run.stdout


# ----------------------------------------------------------------- running


def _trial(state: str, **shown: object) -> TrialStatus:
    return TrialStatus("0123456789", "both", 0, 8, state=state, **shown)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["finished", "diverged"], 0),
        (["finished", "failed"], 1),
        (["finished", "interrupted", "waiting"], 130),
        (["failed", "interrupted"], 130),
    ],
)
def test_exit_code_tells_results_from_failures_and_interruption(states: list[str], code: int) -> None:
    summary = Summary(tuple(map(_trial, states)), skipped=0, seconds=1.0, mirror_error=None, retries=0)
    assert cli._exit_code(summary) == code


def test_without_a_terminal_each_change_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [_trial("waiting"), _trial("running"), _trial("running", epoch=0.5), _trial("running", epoch=1.0, knn=31.0)]
    with terminal.following(Console(file=io.StringIO())) as show:
        for trial in shown:
            show(Progress((trial,), mirror_error=None, retries=0, seconds_left=None))
    assert capsys.readouterr().out.splitlines() == [
        "both, seed 0: running",
        "both, seed 0: running, k-NN 31.0 %, collapse none",
    ]


def test_live_table_fits_the_terminal_and_tells_of_retries_and_of_mlflow() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=12)
    trials = (*(_trial("finished") for _ in range(30)), _trial("running", epoch=2.0, entropy_fraction=0.5))
    with terminal.following(screen) as show:
        show(Progress(trials, mirror_error="server is down", retries=2, seconds_left=250.0))
    drawn = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "2.0/8" in drawn
    assert "1 running, 30 finished" in drawn
    assert "about 4.2 min left" in drawn
    assert "2 attempts taken up again" in drawn
    assert "server is down" in drawn


@pytest.mark.ray
def test_run_report_and_ui_of_a_small_ablation(folder: Path) -> None:
    options = [*SMOKE, "--set", "epochs=1"]

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "dino_lab", *arguments]
        return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)

    first = command("run", "collapse", *options)
    assert first.returncode == 0, first.stderr
    assert "both, seed 0: running" in first.stdout
    assert "report collapse --set epochs=1 --baseline smoke --seeds 0" in first.stdout

    again = json.loads(command("run", "collapse", *options, "--json").stdout)
    assert again["skipped"] == 3
    assert {trial["state"] for trial in again["trials"]} == {"finished"}
    planned = json.loads(command("plan", "collapse", *options, "--json").stdout)
    assert {found["rule"] for found in planned["findings"]} >= {"no_centering", "no_sharpening"}
    assert again["findings"] == planned["findings"]

    report = command("report", "collapse", *options)
    assert report.returncode == 0, report.stderr
    assert "sharpening only" in report.stdout
    assert "trials: 3 finished" in report.stdout
    assert (folder / "lab" / "reports" / "collapse" / "report.html").exists()

    ui = subprocess.Popen([sys.executable, "-m", "dino_lab", "ui"], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert ui.stdout is not None
    link = next(line for line in ui.stdout if line.startswith("http"))
    assert "?workflowType=machine_learning" in link
    with urllib.request.urlopen(link.split("#")[0]) as page:
        assert page.status == 200
    ui.send_signal(signal.SIGTERM)
    assert ui.wait() == 0
