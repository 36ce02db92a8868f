#!/bin/bash
#SBATCH --job-name=dino-lab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Ray on the nodes of a Slurm job, and one `dino-lab run` on it.
#
# Run: on 2026-11-27, in Slurm 22.05 with three nodes on one machine: a sweep to its end; put back into the queue by its
# time limit and by a preemption, and ended when it came again; cancelled; stopped. Not tried: nodes apart, GPUs.
#
# From a clone that all nodes see, once set up there with `python3 -m dino_lab doctor`:
#
#     export LAB=/shared/lab MLFLOW_TRACKING_URI=http://tracking:5000
#     sbatch --nodes=4 --gpus-per-node=8 experiments/clusters/slurm.sh teacher_temperature \
#         --baseline imagenet_vits16 --set runtime.device=cuda --set runtime.gpus=1 --set runtime.cpus=8
#
# Options before the file are sbatch's and replace those above; what follows it is `dino-lab run`'s.
#
# Two minutes before its time is up the run stops as at Ctrl-C, and when it is preempted it ends with its Ray. Either
# way the job goes back into the queue, and the same command goes on where each trial was. scancel and `dino-lab stop`
# end it for good. Logs of Ray: slurm-JOB.ray here, and /tmp/ray-JOB-* on the nodes, which a run that succeeds removes.
#
# Ray listens on every interface of a node, whatever it is told. What keeps others out is the token, made anew for each
# job and known to its processes alone, and the nodes' firewall: nodes must be reachable from the cluster only.
set -euo pipefail

: "${LAB:?set it to a folder on a file system that all nodes share}"
: "${MLFLOW_TRACKING_URI:?set it to an MLflow server, or PostgreSQL}" # read by dino-lab: its password is not for ps
cd "$SLURM_SUBMIT_DIR"
[[ -x .venv/bin/dino-lab ]] || { echo 'submit it from the clone, after: python3 -m dino_lab doctor' >&2; exit 2; }

private_address() { # of this node, by its name or, where that says nothing, its first one
    local address
    address=$(getent ahostsv4 "$SLURMD_NODENAME" | awk '$1 !~ /^127\./ { print $1; exit }') || true
    [[ $address ]] || address=$(hostname -I | awk '{ print $1 }')
    case $address in
    10.* | 192.168.* | 172.1[6-9].* | 172.2?.* | 172.3[01].*) echo "$address" ;;
    *) echo "$SLURMD_NODENAME: $address is not a private address" >&2 && return 1 ;;
    esac
}

ray_node() { # until it is killed; one that does not come up tries again
    set -euo pipefail
    umask 077
    local options=(--node-ip-address "$(private_address)" --num-cpus "$SLURM_CPUS_PER_TASK" --block)
    options+=(--disable-usage-stats --object-store-memory 104857600 --temp-dir "/tmp/ray-$SLURM_JOB_ID-$SLURM_PROCID")
    if [[ $SLURM_PROCID == 0 ]]; then
        options+=(--head --port "${RAY_ADDRESS##*:}" --include-dashboard false)
    else
        options+=(--address "$RAY_ADDRESS")
        until (: <"/dev/tcp/${RAY_ADDRESS/://}") 2>/dev/null; do sleep 1; done
    fi
    for _ in 1 2 3; do
        .venv/bin/ray start "${options[@]}" && return
    done
}

await() { # a process, whatever signals come meanwhile; its exit code
    local code=0
    while kill -0 "$1" 2>/dev/null; do
        wait "$1" && code=0 || code=$?
    done
    return "$code"
}

RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(.venv/bin/python -c 'import secrets; print(secrets.token_hex(32))')
# This script runs on the first node, where the head is.
RAY_ADDRESS=$(private_address):$((20000 + SLURM_JOB_ID % 10000))
export RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_ADDRESS

told='' now='' nodes=''
trap 'told=1; [[ -z $now ]] || kill -TERM "$now" 2>/dev/null || true' TERM
trap 'told=1; [[ -z $now ]] || kill -KILL "$now" 2>/dev/null || true' USR1
end_ray() { # step 0 of this job; never `ray stop`, which ends every Ray of this user
    [[ $nodes ]] || return 0
    scancel --signal=KILL "$SLURM_JOB_ID.0" 2>/dev/null || true
    wait "$nodes" || true
    nodes=''
}
trap end_ray EXIT

{ # Who is preempted with time to go may be told by the end of its steps alone: without Ray nothing can stop in order.
    code=0
    srun --overlap --export=ALL --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        bash -c "$(declare -f private_address ray_node); ray_node" || code=$?
    [[ $code != 143 ]] || kill -USR1 $$
} >"slurm-$SLURM_JOB_ID.ray" 2>&1 &
nodes=$!

.venv/bin/python - "$SLURM_JOB_NUM_NODES" <<'PYTHON' &
import os
import socket
import sys
import time

host, port = os.environ["RAY_ADDRESS"].split(":")
deadline = time.monotonic() + 300
while True:
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
        break
    except OSError as error:
        if time.monotonic() > deadline:
            sys.exit(f"Ray has not started: {error}")
        time.sleep(1)
import ray

ray.init(log_to_driver=False, logging_level="ERROR")
while (alive := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    if time.monotonic() > deadline:
        sys.exit(f"only {alive} of {sys.argv[1]} nodes have joined")
    time.sleep(1)
PYTHON
now=$!
code=0
await "$now" || code=$?
if [[ $told ]]; then
    code=143
elif [[ $code == 0 ]]; then
    .venv/bin/dino-lab run "$@" --address "$RAY_ADDRESS" --lab "$LAB" &
    now=$!
    await "$now" || code=$?
fi
end_ray
[[ $code != 0 ]] || srun --overlap --ntasks-per-node=1 bash -c 'rm -r "/tmp/ray-$SLURM_JOB_ID-$SLURM_PROCID"'

# Of a job that was cancelled, or put back already, Slurm says so.
if [[ $told && $code != 0 && $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
    echo 'back into the queue'
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
