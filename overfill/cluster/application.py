"""A stack as a Serve config: what ``serve deploy`` takes, and what ``overfill up`` deploys. Plain data, no Ray.

The number of replicas is decided by one application-level policy, which only such a config can name; that is why
``up`` deploys one too, instead of calling ``serve.run``.
"""

from __future__ import annotations

from typing import Any

from overfill.cluster.policy import scaling_config
from overfill.cluster.spec import DRAIN_MARGIN, PREFILL, ROUTER, PoolSpec, StackSpec
from overfill.settings.environment import GRPC_ENVIRONMENT, thread_pools

BUILDER = "services.ray.app:build"
POLICY = "overfill.cluster.policy:ScalingPolicy"

SIGNAL_INTERVAL = 1.0
"""Seconds between a router's signals to the autoscaler."""


def serve_config(spec: StackSpec, name: str, objectives: dict[str, float] | None = None) -> dict[str, Any]:
    """The config that deploys ``spec`` as application ``name``.

    Args:
        objectives: the policy's arguments, as ``overfill.cluster.policy.ScalingPolicy`` takes them.

    Raises:
        ValueError: the policy does not take such arguments.
    """
    scaling_config(objectives or {})  # here, where somebody reads the message, and not in Serve's controller
    application: dict[str, Any] = {
        "name": name,
        "import_path": BUILDER,
        "route_prefix": None,  # Serve's proxies have no part in it
        "args": spec.model_dump(mode="json", exclude_defaults=True),
    }
    if spec.scales:
        application["autoscaling_policy"] = {"policy_function": POLICY, "policy_kwargs": objectives or {}}
    return {"proxy_location": "Disabled", "logging_config": {"log_level": "WARNING"}, "applications": [application]}


def deployment_options(spec: StackSpec, name: str) -> dict[str, Any]:
    """What ``serve.deployment(...).options`` takes for the deployment ``name``."""
    pool = spec.pools[name]
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
        # Longer than what a drain may take, so that it is Serve that waits for us.
        "graceful_shutdown_timeout_s": spec.grace_period + DRAIN_MARGIN,
        "graceful_shutdown_wait_loop_s": 0.1,  # no request of ours passes through Serve: it need not wait for any
    }
    if not spec.scales:
        return options | {"num_replicas": pool.replicas}
    return options | {"autoscaling_config": _autoscaling(pool)}


def environment(spec: StackSpec, name: str) -> dict[str, str]:
    """Variables of a replica's process: threads first of all, which Ray would set to its share of CPUs, rounded up."""
    threads = 1 if name == ROUTER else (spec.prefill_config() if name == PREFILL else spec.decode_config()).threads
    return GRPC_ENVIRONMENT | thread_pools(threads) | {
        # One event loop for the replica and the service in it: grpc.aio serves one loop of a process.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(SIGNAL_INTERVAL),
    }  # fmt: skip


def _autoscaling(pool: PoolSpec) -> dict[str, Any]:
    return {
        "min_replicas": pool.replicas,
        "initial_replicas": pool.replicas,
        "max_replicas": pool.max_replicas_total,
        # The policy's scaler waits and smooths as its own rules say.
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "look_back_period_s": 20.0,  # the policy takes the newest; Serve wants more than its own interval of 10
    }
