"""The cluster templates, as far as that is possible without a cluster."""

import ipaddress
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from dino_lab import asking, cli

CLUSTERS = Path(__file__).parents[1] / "experiments" / "clusters"
TEMPLATES = sorted(CLUSTERS.iterdir())
KUBERAY = list(yaml.safe_load_all((CLUSTERS / "kuberay.yaml").read_text()))
RAY_UP = yaml.safe_load((CLUSTERS / "ray_up.yaml").read_text())


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What a command of `dino-lab` is given."""
    name, *rest = arguments
    return typer.main.get_command(cli.app).commands[name].make_context(name, rest).params  # type: ignore[attr-defined]


def commands() -> list[list[str]]:
    """Every command line of `dino-lab` in the templates, those of comments too."""
    lines = [KUBERAY[2]["spec"]["entrypoint"]]
    for template in TEMPLATES:
        text = re.sub(r"^# ?", "", template.read_text(), flags=re.MULTILINE)
        lines += re.sub(r"\\\n", " ", text).splitlines()
    found = []
    for line in lines:
        words = shlex.split(line.replace('"$@"', "collapse").rstrip("&"), comments=True) if "dino-lab " in line else []
        for i, word in enumerate(words):
            if word in ("dino-lab", ".venv/bin/dino-lab") and words[i + 1 : i + 2] == ["run"]:
                found.append(words[i + 1 :])
            if word.endswith("slurm.sh"):
                found.append(["run", *words[i + 1 :]])
    return found


def pods() -> list[dict[str, Any]]:
    spec = KUBERAY[2]["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [spec["submitterPodTemplate"]["spec"], *(group["template"]["spec"] for group in groups)]


def test_there_are_commands_of_each_template() -> None:
    assert [template.name for template in TEMPLATES] == ["kuberay.yaml", "ray_up.yaml", "slurm.sh"]
    assert len(commands()) == 4


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_is_one_that_runs(command: list[str]) -> None:
    asked = parsed(command)
    assert asked["name"] in asking.experiments()
    asking.find_baseline(asked["baseline"]).but(asking.parse_changes(asked["changes"]))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_a_template_says_whether_it_was_run(template: Path) -> None:
    comments = [line for line in template.read_text().splitlines()[:30] if line.startswith("# ")]
    assert len([line for line in comments if re.match(r"# (Run|Not run): ", line)]) == 1


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_nothing_of_a_template_is_open_to_the_world(template: Path) -> None:
    text = template.read_text()
    for word in ("0.0.0.0", "LoadBalancer", "NodePort", "hostNetwork", "hostPort", "dashboard-host", "--tracking-uri"):
        assert word not in text
    assert re.search(r"RAY_AUTH_MODE=token\b|\bmode: token\b", text)
    code = re.sub(r"#.*", "", text)
    assert "ray stop" not in code, "it would end what others started"


def test_slurm_sh_is_a_script() -> None:
    subprocess.run(["bash", "-n", CLUSTERS / "slurm.sh"], check=True)


def test_slurm_sh_goes_on_after_a_preemption() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", (CLUSTERS / "slurm.sh").read_text(), flags=re.MULTILINE)
    assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append"} <= set(options)


def test_pods_run_as_nobody_in_particular() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            (uri,) = (each for each in container["env"] if each["name"] == "MLFLOW_TRACKING_URI")
            assert "secretKeyRef" in uri["valueFrom"]


def test_every_pod_of_ray_has_the_lab_and_the_locked_ray() -> None:
    lab = parsed(commands()[0])["lab"]
    for pod in pods()[1:]:
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["lab"] == str(lab)
        assert {"name": "lab", "persistentVolumeClaim": {"claimName": "dino-lab"}} in pod["volumes"]
    version = KUBERAY[2]["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"\nray=={version} " in (CLUSTERS.parents[1] / "dino_lab" / "requirements.lock").read_text()
    assert f"'ray[default]=={version}'" in (CLUSTERS / "kuberay.yaml").read_text()


def test_ray_up_has_private_machines_and_counts_all_of_them() -> None:
    machines = [RAY_UP["provider"]["head_ip"], *RAY_UP["provider"]["worker_ips"]]
    assert all(ipaddress.ip_address(machine).is_private for machine in machines)
    (kind,) = RAY_UP["available_node_types"].values()
    assert {kind["min_workers"], kind["max_workers"], RAY_UP["max_workers"]} == {len(machines)}
