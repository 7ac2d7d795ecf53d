"""This process and a Ray cluster: start one here or join one, deploy an application, watch it, take it away again.

Knows nothing of how a stack is planned. An application is deployed with a Serve config, beside those that run there.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from overfill.cluster import placement
from overfill.cluster.spec import StackSpec
from overfill.errors import OverfillError
from overfill.process.extras import install_line
from overfill.rpc.addresses import is_loopback

_OBJECT_STORE = 80 << 20  # bytes; nothing of ours goes through it, and this is about the least that Ray takes
_QUIET = {"log_level": "WARNING"}
_POLL = 0.2
_CONNECT = 5.0  # seconds for a cluster's head to take a connection

_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's way to say: no other machine will ever join. It then listens on loopback only and takes 127.0.0.1 for this
machine's address; the switch is named after the systems where that is the default. Read when Ray is imported."""
_FOLDER = "overfill-ray-"
_TRIES = 3  # Ray gives itself 30 s, which a busy machine may exceed


class RayUnavailable(OverfillError):
    """There is no Ray here, or no cluster where it should be."""


class RayConnection:
    """A connection to a cluster. Make it with ``start_local`` or ``join``; ``close`` ends what it started.

    Attributes:
        owned: whether the cluster was started here, and ends with the session.
    """

    def __init__(self, owned: bool, folder: str | None = None) -> None:
        self.owned = owned
        self._folder = folder

    @classmethod
    def start_local(cls, cpus: int, show_logs: bool) -> RayConnection:
        """A cluster of this machine alone, whose every port is on loopback; it dies with this process.

        Args:
            cpus: how many it reckons with.
            show_logs: whether the replicas' lines appear here.

        Raises:
            RayUnavailable: Ray does not come up.
        """
        check_installed()
        os.environ |= _LOOPBACK
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        _sweep()
        # Short: sockets in it have paths of 107 bytes at most.
        folder = tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-", dir="/tmp")
        for tries_left in reversed(range(_TRIES)):
            try:
                _init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE,
                    _temp_dir=folder,
                    log_to_driver=show_logs,
                )
                break
            except BaseException as error:
                slow = "timed out during startup" in str(error)
                if slow and tries_left:
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                if slow:
                    raise RayUnavailable(
                        "Ray does not come up: this machine is too busy, or too small; --no-ray starts plain processes"
                    ) from error
                raise
        return cls(True, folder)

    @classmethod
    def join(cls, address: str, show_logs: bool) -> RayConnection:
        """The cluster at ``address``: ``auto``, or HOST:PORT of its head. This machine must be part of it.

        Raises:
            RayUnavailable: there is none.
        """
        check_installed()
        _check_head(address)
        try:
            _init(address=address, log_to_driver=show_logs)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RayUnavailable(f"no Ray cluster at {address}: {error}") from error
        return cls(False)

    def check_room(self, spec: StackSpec) -> None:
        """Raises NoRoom, naming the resource, when the cluster's machines cannot hold the stack as it starts."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        placement.check_room(spec, machines if self.owned else _free(machines, ray.available_resources()))

    def deploy(self, config: dict[str, Any]) -> None:
        """Deploys the application of a Serve config. Does not wait for it.

        Raises:
            RayUnavailable: an application of that name runs there already.
        """
        (application,) = config["applications"]
        if application["name"] in self._applications():
            raise RayUnavailable(
                f"an application {application['name']!r} runs on this cluster already: give another --name, or take "
                f"it away with `serve shutdown` or the `overfill up` that runs it"
            )
        self._apply([*self._others(application["name"]), application])

    def remove(self, name: str, timeout: float) -> bool:
        """Takes the application away and waits for its replicas to drain; whether all had left in time."""
        from overfill.cluster import directory

        self._apply(self._others(name))
        deadline = time.monotonic() + timeout
        while (there := name in self._applications()) and time.monotonic() < deadline:
            time.sleep(_POLL)
        directory.end(name)
        return not there

    def status(self, name: str) -> Any | None:
        """Serve's ``ApplicationStatusOverview``; None when there is no such application."""
        return self._applications().get(name)

    def alive(self) -> bool:
        """Whether the cluster answers."""
        import ray

        try:
            return ray.is_initialized() and any(node["Alive"] for node in ray.nodes())
        except Exception:  # whatever Ray raises of a cluster that is not there
            return False

    def close(self) -> None:
        """Leaves the cluster, which ends if it was started here."""
        import ray

        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _applications(self) -> dict[str, Any]:
        from ray import serve

        return dict(serve.status().applications)

    def _others(self, name: str) -> list[dict[str, Any]]:
        """Configs of the other applications: what is not in a new config is taken away."""
        details = _controller().get_serve_details()["applications"]
        configs = [app.get("deployed_app_config") for other, app in details.items() if other != name]
        return [config for config in configs if config]

    def _apply(self, applications: list[dict[str, Any]]) -> None:
        from ray.serve.schema import ServeDeploySchema

        # As the dashboard does for `serve deploy`; a policy for a whole application has no other way in, and a
        # cluster that lives as long as this process needs no dashboard.
        schema = {"proxy_location": "Disabled", "logging_config": _QUIET, "applications": applications}
        _controller().deploy_apps(ServeDeploySchema.model_validate(schema))


def check_installed() -> None:
    """Raises RayUnavailable, saying what to do, when Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise RayUnavailable(f"Ray is not installed: {install_line('server')}, or run plain processes with --no-ray")


def _check_head(address: str) -> None:
    """Raises RayUnavailable when nobody listens there: Ray itself would go on trying for ever.

    Ray takes a loopback address for that of this machine on the network. If only loopback answers, it is told not to.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # such as auto: Ray knows its own
    if is_loopback(host) and _answers(_own_address(), int(port)):
        return
    if not _answers(host, int(port)):
        raise RayUnavailable(f"no Ray cluster at {address}: nobody listens there")
    if is_loopback(host):
        os.environ |= _LOOPBACK


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host.strip("[]"), port), _CONNECT).close()
    except OSError:
        return False
    return True


def _own_address() -> str:
    """Of this machine on the network, as Ray finds it: from where it would send to elsewhere. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _sweep() -> None:
    """Removes what sessions left behind that were killed."""
    for folder in glob.glob(f"/tmp/{_FOLDER}*"):
        pid = folder.removeprefix(f"/tmp/{_FOLDER}").partition("-")[0]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(folder, ignore_errors=True)


def _init(**arguments: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if os.environ.get("NO_COLOR") or not (sys.stdout.isatty() and sys.stderr.isatty()):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # in front of each replica's lines, which come by both
    with _signal_handlers_kept():
        import ray
        from ray import serve

        ray.init(logging_level=logging.ERROR, namespace="overfill", **arguments)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=_QUIET)


def _controller() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client()


def _free(machines: list[dict[str, float]], available: dict[str, float]) -> list[dict[str, float]]:
    """What is free of ``machines``, as one: Ray tells it for the whole cluster only."""
    names = {name for machine in machines for name in machine}
    return [{name: available.get(name, 0.0) for name in names}]


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
