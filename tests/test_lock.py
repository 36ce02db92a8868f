"""The lock: hashed, without any address, and in agreement with pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "dino_lab" / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
ASKED = [Requirement(text) for texts in [PROJECT["dependencies"], *EXTRAS] for text in texts]

# A requirement begins at the margin; its hashes and comments are indented.
ENTRIES = re.split(r"\n(?=\S)", LOCK.strip())
LOCKED = [Requirement(entry.split("\\")[0].strip()) for entry in ENTRIES]


def test_lock_names_no_address() -> None:
    assert "://" not in LOCK


def test_every_locked_requirement_has_one_version_and_hashes() -> None:
    for entry, locked in zip(ENTRIES, LOCKED, strict=True):
        assert re.fullmatch(r"==[^,*]+", str(locked.specifier)), locked
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), locked


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_every_dependency_is_locked_once_within_its_range(python: str, platform: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_system": platform.capitalize(),
        "platform_machine": "x86_64" if platform == "linux" else "arm64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }

    def holds(marker: Marker | None) -> bool:
        return marker is None or marker.evaluate(environment)

    for asked in ASKED:
        versions = [
            next(iter(locked.specifier)).version
            for locked in LOCKED
            if canonicalize_name(locked.name) == canonicalize_name(asked.name) and holds(locked.marker)
        ]
        assert len(versions) == 1, f"{asked}: {versions}"
        assert asked.specifier.contains(versions[0]), f"{asked}: {versions}"


def test_what_builds_the_project_is_locked_too() -> None:
    """The launcher installs the project without build isolation."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    versions = {locked.name: next(iter(locked.specifier)).version for locked in LOCKED}
    for asked in map(Requirement, build):
        assert asked.specifier.contains(versions[asked.name])


def test_torch_is_pinned_to_the_tried_version() -> None:
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= {str(locked).split(";")[0].strip() for locked in LOCKED}
