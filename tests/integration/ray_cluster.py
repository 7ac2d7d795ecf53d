"""``python ray_cluster.py NODES CPUS DASHBOARD_PORT``: a Ray cluster of several nodes on loopback, until stdin ends.

Runs as a process of its own, to keep Ray's nodes and warnings out of the tests' process. Prints the address of the
cluster's head once the head is up.
"""

import os
import sys

os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from ray.cluster_utils import Cluster  # the variables are read at import


def main() -> None:
    nodes, cpus, port = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    arguments = {"num_cpus": cpus, "object_store_memory": 80 << 20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args=arguments | {"include_dashboard": True, "dashboard_port": port, "dashboard_host": "127.0.0.1"},
    )
    for _ in range(nodes - 1):
        cluster.add_node(**arguments)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
