"""Makes a Serve config for a stack, as ``serve deploy`` and ``overfill up`` deploy it. Plain data, no Ray.

An application-level policy decides the number of replicas. Only a config can name such a policy, so ``up`` deploys a
config too, instead of calling ``serve.run``.
"""

from __future__ import annotations

from typing import Any

from overfill.routing.scaling import INTERVAL
from overfill.settings.environment import GRPC_ENVIRONMENT, thread_pools
from overfill.settings.tiers import PoolSpec, TierSpec
from overfill.stack.ray.policy import ScalingPolicy
from overfill.stack.spec import DRAIN_MARGIN, ROUTER, StackSpec

BUILDER = "services.ray.app:build"
POLICY = "overfill.stack.ray.policy:ScalingPolicy"


def serve_config(spec: StackSpec, name: str, objectives: dict[str, float] | None = None) -> dict[str, Any]:
    """Returns the config that deploys ``spec`` as application ``name``.

    Args:
        objectives: arguments of ``overfill.stack.ray.policy.ScalingPolicy``.

    Raises:
        ValueError: the policy does not have such an argument.
    """
    policy: dict[str, Any] = dict(objectives or {})
    tiers = {tier: own for tier, pool in spec.tiers.items() if (own := _objectives(pool))}
    if spec.canary is not None:
        of_canary = {tier: _objectives(pool) for tier, pool in spec.canary.tiers.items()}
        tiers |= {
            f"{tier}-{spec.canary.revision}": own for tier, own in of_canary.items() if own != tiers.get(tier, {})
        }
    if tiers:
        policy["tiers"] = tiers
    ScalingPolicy(**policy)  # check here, because an error in Serve's controller would not reach the user
    application: dict[str, Any] = {
        "name": name,
        "import_path": BUILDER,
        "route_prefix": None,  # requests do not pass through Serve's proxies
        "args": spec.document(),
    }
    if spec.scales:
        application["autoscaling_policy"] = {"policy_function": POLICY, "policy_kwargs": policy}
    return {"proxy_location": "Disabled", "logging_config": {"log_level": "WARNING"}, "applications": [application]}


def deployment_options(spec: StackSpec, name: str) -> dict[str, Any]:
    """Returns the arguments of ``serve.deployment(...).options`` for the deployment ``name``."""
    pool = spec.deployments[name]
    options: dict[str, Any] = {
        "name": name,
        "ray_actor_options": {
            "num_cpus": pool.num_cpus,
            "num_gpus": pool.num_gpus,
            "resources": pool.resources,
            "runtime_env": {"env_vars": environment(spec, name)},
        },
        "health_check_period_s": spec.health_check_period,
        "health_check_timeout_s": spec.health_check_timeout,
        # Longer than a drain may take, so that Serve waits until the replica has drained.
        "graceful_shutdown_timeout_s": spec.grace_period + DRAIN_MARGIN,
        "graceful_shutdown_wait_loop_s": 0.1,  # requests do not pass through Serve, so it has none to wait for
    }
    if not spec.scales:
        return options | {"num_replicas": pool.replicas}
    return options | {"autoscaling_config": _autoscaling(pool)}


def environment(spec: StackSpec, name: str) -> dict[str, str]:
    """Returns the environment of a replica's process.

    It sets the thread counts, which Ray would otherwise set to the replica's share of CPUs, rounded up. It hides all
    GPUs from a replica that has reserved none: Ray no longer does, and such replicas would all take the first GPU.
    """
    threads = 1 if name == ROUTER else spec.worker_config(name).threads
    hidden = {} if spec.deployments[name].num_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return GRPC_ENVIRONMENT | thread_pools(threads) | {
        # The replica and its service share one event loop, because grpc.aio supports one loop per process.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(INTERVAL),
        **hidden,
    }  # fmt: skip


def _objectives(pool: TierSpec) -> dict[str, float]:
    """Returns the tier's own objectives, by setting of the scaling policy."""
    found = {"ttft": pool.ttft_objective, "itl": pool.itl_objective}
    return {name: value for name, value in found.items() if value is not None}


def _autoscaling(pool: PoolSpec) -> dict[str, Any]:
    return {
        "min_replicas": pool.replicas,
        "initial_replicas": pool.replicas,
        "max_replicas": pool.most,
        # No delays here, because the policy's scaler has its own.
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "look_back_period_s": 20.0,  # the policy uses the newest value; must exceed Serve's 10 s interval
    }
