"""``services.ray.app:build``, the application builder with typed arguments that a Serve config names."""

# No postponed annotations here: Serve reads the argument's class to build the argument from the config's ``args``.

from collections.abc import Callable

import ray
from ray import serve
from ray.serve import Application, Deployment

from overfill.rpc.addresses import is_loopback
from overfill.stack.ray.application import deployment_options
from overfill.stack.spec import ROUTER, StackSpec
from services.ray.replicas import Replica, RouterReplica, WorkerReplica


def build(spec: StackSpec) -> Application:
    """Builds the deployments of ``spec``: the routers, and the workers of each kind and tier.

    Raises:
        ValueError: the cluster has several machines, and the services would listen on loopback only.
    """
    check_reachable(str(spec.settings.get("host", "127.0.0.1")), {n["NodeManagerAddress"] for n in _alive_nodes()})
    pools = [_deployment(WorkerReplica, spec, name).bind(name, spec) for name in spec.pools]
    return _deployment(RouterReplica, spec, ROUTER).bind(spec, *pools)


def check_reachable(host: str, machines: set[str]) -> None:
    """Raises ValueError if services on ``host`` cannot reach each other across ``machines``."""
    if is_loopback(host) and len(machines) > 1:
        raise ValueError(
            f"settings.host {host} is reachable from its own machine only, but the cluster has {len(machines)} "
            "machines. Set host to 0.0.0.0, and api_keys, tls_cert, tls_key and tls_ca to files on every machine"
        )


def _deployment(kind: type[Replica], spec: StackSpec, name: str) -> Deployment:
    decorate: Callable[[type[Replica]], Deployment] = serve.deployment(**deployment_options(spec, name))
    return decorate(kind)


def _alive_nodes() -> list[dict[str, str]]:
    return [node for node in ray.nodes() if node["Alive"]]
