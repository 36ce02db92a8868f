"""Three Ray nodes on loopback in a process of its own: python -m tests.faults.cluster. Nodes are killed by a line.

It prints the address, then obeys each line of its input: `kill` kills -9 a node that is not the head's and starts
another in its place.
"""

import os
import sys

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on loopback alone

import psutil
from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        lost = nodes.pop(0)
        for process in lost.live_processes():
            pid = process[1].pid
            for each in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
                each.kill()
        cluster.worker_nodes.discard(lost)
        nodes.append(cluster.add_node(**NODE))
        print("killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
