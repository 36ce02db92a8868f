import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_lab.core import checkpoint

CPU = torch.device("cpu")
STATE: dict[str, Any] = {"step": 3, "trial": "abc", "weights": {"a": torch.arange(5.0)}, "since": None}


@pytest.mark.parametrize("device", [CPU, None])
def test_what_is_saved_is_loaded(device: torch.device | None, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", STATE)
    loaded = checkpoint.load(tmp_path / "c.pt", device=device)
    assert torch.equal(loaded["weights"]["a"], STATE["weights"]["a"])
    assert loaded["weights"]["a"].device == CPU
    assert {k: v for k, v in loaded.items() if k != "weights"} == {k: v for k, v in STATE.items() if k != "weights"}
    assert os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.parametrize("crash_in", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_crash_while_writing_leaves_the_old_file(
    crash_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)

    def crash(*args: Any, **_: Any) -> None:
        if crash_in == "torch.save":
            args[1].write(b"half a checkpoint")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(crash_in, crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, STATE | {"step": 4})
    assert checkpoint.load(path, device=CPU)["step"] == 3

    checkpoint.save(path, STATE | {"step": 4})  # and what the crash left is no hindrance
    assert checkpoint.load(path, device=CPU)["step"] == 4


@pytest.mark.parametrize(
    "content", [b"", b"P", b"not a checkpoint", b"\x80\x02}q\x00.", b"torn", b"\x00a", b"(s."], ids=repr
)
def test_a_file_that_is_no_checkpoint_is_a_runtime_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"c\.pt cannot be read"):
        checkpoint.load(tmp_path / "c.pt", device=CPU)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_a_runtime_error(part: float, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", STATE)
    content = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(content[: int(part * len(content))])
    with pytest.raises(RuntimeError, match=r"c\.pt cannot be read"):
        checkpoint.load(tmp_path / "c.pt", device=CPU)


def test_a_file_that_is_not_there_is_a_runtime_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be read"):
        checkpoint.load(tmp_path / "c.pt", device=CPU)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def test_loading_runs_no_code_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Evil()}, tmp_path / "c.pt")
    with pytest.raises(RuntimeError, match="cannot be read"):
        checkpoint.load(tmp_path / "c.pt", device=CPU)
    assert not (tmp_path / "evil").exists()


def test_a_flipped_bit_is_a_runtime_error(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", STATE)
    content = bytearray((tmp_path / "c.pt").read_bytes())
    content[content.index(torch.arange(5.0).numpy().tobytes()) + 6] ^= 1
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(RuntimeError, match="is damaged"):
        checkpoint.load(tmp_path / "c.pt", device=CPU)
