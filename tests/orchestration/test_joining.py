import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
CONNECT = """
import sys
from dino_lab.orchestration.cluster import alive_nodes, connected
try:
    with connected(sys.argv[1]):
        print(len(alive_nodes()), "node")
except ValueError as error:
    print(error)
"""
PYTHON = [sys.executable, "-c"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray of one node on loopback that wants the token `right`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    files = tmp_path_factory.mktemp("ray")
    start = "from ray.scripts.scripts import main; main()"
    options = ["--num-cpus=1", "--object-store-memory=80000000", "--include-dashboard=false", f"--temp-dir={files}"]
    node = subprocess.Popen(
        [*PYTHON, start, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "right"},
    )
    assert node.stdout
    said = []
    for line in node.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            break
    else:
        pytest.fail("".join(said))
    yield f"127.0.0.1:{port}"
    node.terminate()
    node.communicate(timeout=60)


def said_when_connecting(address: str, home: Path, **environment: str) -> str:
    """By a driver in a process of its own, the last line: Ray reads its environment when it is imported."""
    of_ray = {name for name in os.environ if name.startswith("RAY_AUTH_")}
    clean = {name: value for name, value in os.environ.items() if name not in of_ray}
    driver = subprocess.run(
        [*PYTHON, CONNECT, address],
        cwd=ROOT,
        env=clean | LOOPBACK | {"HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return driver.stdout.strip().splitlines()[-1]


@pytest.mark.ray
def test_a_driver_with_the_clusters_token_connects(address: str, tmp_path: Path) -> None:
    assert said_when_connecting(address, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="right") == "1 node"
    token = tmp_path / "token"
    token.write_text("right\n")
    assert said_when_connecting(address, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)) == "1 node"
    (tmp_path / ".ray").mkdir()
    token.rename(tmp_path / ".ray" / "auth_token")
    assert said_when_connecting(address, tmp_path, RAY_AUTH_MODE="token") == "1 node"
    assert said_when_connecting(address, tmp_path).startswith(f"--address {address}: it wants a token"), "not read"


@pytest.mark.ray
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RAY_AUTH_MODE": "token"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/missing"},
        {"RAY_AUTH_TOKEN": "right"},
    ],
    ids=["nothing", "no token", "another token", "no file", "no mode"],
)
def test_a_driver_without_the_clusters_token_is_told_what_to_set(
    address: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    said = said_when_connecting(address, tmp_path, **environment)
    assert said == (
        f"--address {address}: it wants a token, and this process has none or another: set RAY_AUTH_MODE=token "
        "and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, as on the cluster's nodes"
    )
