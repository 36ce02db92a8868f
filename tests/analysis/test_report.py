"""The report: self-contained, escaped, listed in its manifest, and the same bytes from any process."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from analysis import report, tables
from analysis.__main__ import main

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """Tags, and every address that a page names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in {"src", "srcset", "data", "poster", "action"} or (tag == "link" and name == "href"):
                self.loads.append(value or "")
            elif name == "href":
                self.links.append(value or "")


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def written(store, tmp_path_factory):
    lab = tmp_path_factory.mktemp("written")
    (lab / "mlflow.db").write_bytes((store / "mlflow.db").read_bytes())
    return report.write(lab, "collapse", baseline="shapes_cpu", overrides={"epochs": 8})


@pytest.fixture
def page(written):
    return (written / "report.html").read_text()


def test_what_the_experiment_says_is_not_broken_where_its_file_breaks_lines(sweep):
    note = "Which?\n\nExpect: a long\nline.\n\nCommand: run it\nCost: 9 trials,\n5 minutes."
    shown = {"table": tables.arms_table(sweep), "factors": tables.factors_table(sweep)}
    page = report.html(replace(sweep, note=note), shown, {"figure": b"", "factors": b""}, [])
    assert "Expect: a long line.</p>" in page
    assert "Command: run it\nCost: 9 trials, 5 minutes.</p>" in page


def test_the_same_records_give_the_same_bytes_in_another_process(written, lab, tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsavefig.dpi: 30\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-m", "analysis", "collapse", "--lab", str(lab), "--set", "epochs=8"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    folder = Path(done.stdout.strip())
    assert folder == lab / "reports" / "collapse"
    assert hashes(folder) == hashes(written)


def test_the_manifest_lists_every_other_file_and_every_trial(written):
    manifest = json.loads((written / "manifest.json").read_text())
    on_disk = hashes(written)
    del on_disk["manifest.json"]
    assert manifest["files"] == on_disk
    assert len(manifest["trials"]) == 9
    diverged = {"trial_id": "11abcdef01", "row": "centring only", "seed": 1, "state": "diverged", "verdict": "none"}
    assert manifest["trials"][4] == diverged
    assert manifest["versions"]["pandas"] == pd.__version__


def test_the_frames_can_be_loaded_again(written, sweep):
    pd.testing.assert_frame_equal(pd.read_parquet(written / "frames" / "trials.parquet"), sweep.trials)
    pd.testing.assert_frame_equal(pd.read_parquet(written / "frames" / "curves.parquet"), sweep.curves)


def test_the_page_asks_for_nothing_outside_itself(page, written):
    parsed = Page(page)
    assert len(parsed.loads) == 2
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parsed.loads)
    assert "://" not in page
    assert not re.search(r"@import|url\(", page)
    assert {"script", "iframe", "link"}.isdisjoint(parsed.tags)
    assert all((written / link).is_file() for link in parsed.links)


def test_the_page_says_what_was_asked_what_ended_how_and_how_to_repeat_it(page):
    for words in (
        "Do centring and sharpening keep each other from collapse?",
        "<code>shapes_cpu</code>",
        "<b>7</b> of 9 trials finished, <b>5</b> of them collapsed; <b>1</b> diverged; <b>1</b> missing.",
        "python3 -m dino_lab run collapse --baseline shapes_cpu --set epochs=8",
        "<code>method.loss.sharpening</code>",
        "11abcdef01",
    ):
        assert words in page


def test_what_it_cost_follows_what_the_features_know(page, written):
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[2:5] == ["What the features know", "Evaluations", "What it cost"]
    cost = page[page.index("What it cost") : page.index("How each trial ended")]
    assert "1.23 ± 0.32" in cost
    assert "<strong>" not in cost
    assert 'class="reference' not in cost
    assert {f"{stem}.{form}" for stem in ("cost", "evaluations") for form in ("csv", "md", "tex")} <= {
        path.name for path in written.iterdir()
    }


def test_records_of_before_costs_were_kept_have_a_report_without_them(sweep):
    old = replace(sweep, trials=sweep.trials.drop(columns=["runtime/train_minutes", "runtime/peak_memory_mib"]))
    files = report.contents(old)
    assert not [name for name in files if name.startswith("cost")]
    assert b"What it cost" not in files["report.html"]


def test_data_without_labels_have_a_report(unlabelled):
    files = report.contents(unlabelled)
    assert not [name for name in files if name.startswith("factors")]
    page = files["report.html"].decode()
    assert "What the features know" not in page
    assert 'class="reference' not in page
    assert "k-NN: no trial has it" in page


def test_rows_on_data_with_different_factors_have_a_report(of_two_data_sets):
    files = report.contents(of_two_data_sets)
    header = files["factors.md"].decode().splitlines()[0]
    assert re.findall(r"\w+", header) == ["colour", "digit", "shape", "texture"]
    assert files["factors.pdf"]
    assert "less that of both with the same seed" in files["report.html"].decode()


def test_one_row_has_a_report_without_a_word_of_differences(sweep):
    page = report.contents(replace(sweep, trials=sweep.trials[sweep.trials["row"] == "both"]))["report.html"].decode()
    assert '<img class="factors"' in page
    assert "with the same seed" not in page


def test_what_a_person_wrote_is_text_and_never_markup(sweep):
    evil = "<script>alert(1)</script>"
    named = replace(
        sweep,
        trials=sweep.trials.replace({"row": {"both": evil}}),
        baseline_row=evil,
        note=f"{evil} `{evil}`\n\n{evil}",
        overrides={"data.name": evil},
    )
    page = report.html(named, {"table": tables.arms_table(named)}, {"figure": b""}, ["table.md"])
    assert "script" not in Page(page).tags
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8


def test_a_report_removes_the_files_of_an_earlier_one_and_no_others(lab):
    folder = lab / "reports" / "collapse"
    folder.mkdir(parents=True)
    for name in ("old.md", "notes.txt"):
        (folder / name).write_text("from another time")
    (folder / "manifest.json").write_text(json.dumps({"files": {"old.md": "", "table.md": ""}}))
    assert report.write(lab, "collapse", baseline="shapes_cpu", overrides={"epochs": 8}) == folder
    names = {path.name for path in folder.rglob("*")}
    assert "old.md" not in names
    assert {"notes.txt", "table.md", "report.html"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_a_wrong_name_is_one_line_and_exit_code_2(store, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analysis", "colapse", "--lab", str(store)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "no records of 'colapse' in this lab; with records: collapse" in capsys.readouterr().err
