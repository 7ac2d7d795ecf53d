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
        ValueError: the cluster has several machines, and a service would listen on loopback only.
    """
    check_reachable(spec, len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}))
    pools = [_deployment(WorkerReplica, spec, name).bind(name, spec) for name in spec.pools]
    return _deployment(RouterReplica, spec, ROUTER).bind(spec, *pools)


def check_reachable(spec: StackSpec, machines: int) -> None:
    """Raises ValueError if the services of ``spec`` cannot reach each other across this number of machines."""
    configs = {ROUTER: spec.router_config(), **{name: spec.worker_config(name) for name in spec.pools}}
    closed = {name: config.host for name, config in configs.items() if is_loopback(config.host)}
    if closed and machines > 1:
        hosts = ", ".join(f"{host} of {name}" for name, host in closed.items())
        raise ValueError(
            f"settings.host: {hosts} is reachable from its own machine only, but the cluster has {machines} machines. "
            "Set host to 0.0.0.0, and api_keys, tls_cert, tls_key and tls_ca to files on every machine"
        )


def _deployment(kind: type[Replica], spec: StackSpec, name: str) -> Deployment:
    decorate: Callable[[type[Replica]], Deployment] = serve.deployment(**deployment_options(spec, name))
    return decorate(kind)
