"""What a person should know of this machine and a lab folder before trials start."""

import importlib.util
import os
import platform
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

_PACKAGES = {"sweep": ["ray", "mlflow", "optuna", "psutil"], "analysis": ["pandas", "matplotlib"]}
"""What shows that an extra is installed."""
_TRIAL_GIB = 2.0
"""What one small trial and Ray's own processes take, roughly."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at, and what to do about it if it is not ok."""

    what: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(lab: Path) -> list[Finding]:
    """Looks, changes nothing. `fail`: nothing can be run; `warn`: less can, or not for long."""
    return [_python(), _processors(), _memory(), _disk(lab), *_torch(), *_versions(), *_lab(lab)]


def _python() -> Finding:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("Python", "ok" if good else "fail", platform.python_version(), "" if good else "use 3.11 to 3.13")


def _processors() -> Finding:
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    advice = "" if number > 1 else "trials run one at a time"
    return Finding("processors", "ok" if number > 1 else "warn", str(number), advice)


def _memory() -> Finding:
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        size = min(size, int(text))
    gib = size / 2**30
    enough = gib >= 2 * _TRIAL_GIB
    return Finding("memory", "ok" if enough else "warn", f"{gib:.1f} GiB", "" if enough else "use --concurrency 1")


def _disk(lab: Path) -> Finding:
    there = next(folder for folder in (lab.absolute(), *lab.absolute().parents) if folder.exists())
    gib = shutil.disk_usage(there).free / 2**30
    state: Literal["ok", "warn", "fail"] = "fail" if gib < 1 else "warn" if gib < 5 else "ok"
    return Finding("disk", state, f"{gib:.1f} GiB free in {there}", "" if state == "ok" else "make room, or use --lab")


def _torch() -> list[Finding]:
    import torch

    findings = [Finding("torch", "ok", f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")]
    if torch.cuda.is_available():
        names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        devices = ", ".join(f"{number} x {name}" for name, number in names.items())
        findings.append(Finding("GPU", "ok", devices, "use --set runtime.device=cuda --set runtime.gpus=1"))
    else:
        findings.append(Finding("GPU", "ok", "none", "small baselines need none"))
    processor = torch.cpu.get_capabilities()
    units = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if processor.get(name)]
    advice = "" if units else "precision = bf16 saves no time on this processor"
    return [*findings, Finding("bf16 on the processor", "ok", ", ".join(units) or "none", advice)]


def _versions() -> list[Finding]:
    findings = []
    for extra, packages in _PACKAGES.items():
        there = [package for package in packages if importlib.util.find_spec(package)]
        versions = ", ".join(f"{package} {metadata.version(package)}" for package in there)
        if there == packages:
            findings.append(Finding(extra, "ok", versions))
        else:
            findings.append(Finding(extra, "warn", versions or "missing", f"pip install 'dino-lab[{extra}]'"))
    return findings


def _lab(lab: Path) -> list[Finding]:
    if not lab.exists():
        return [Finding(f"lab {lab}", "ok", "not there yet", "the first run makes it")]
    if not lab.is_dir() or not os.access(lab, os.W_OK):
        return [Finding(f"lab {lab}", "fail", "not a folder that can be written to", "use --lab")]
    from dino_lab.orchestration.folder import TrialFolder

    store = lab / "mlflow.db"
    states = Counter(TrialFolder(lab, path.name).state() for path in lab.glob("trials/*"))
    trials = ", ".join(f"{number} {state}" for state, number in sorted(states.items())) or "none"
    return [
        Finding(f"lab {lab}", "ok", "can be written to"),
        Finding("record", "ok", f"{store.stat().st_size / 2**20:.1f} MiB" if store.exists() else "none yet"),
        Finding(
            "trials",
            "warn" if states["failed"] else "ok",
            trials,
            "the same `run` tries the failed ones again" if states["failed"] else "",
        ),
    ]
