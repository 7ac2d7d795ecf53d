"""Connects this process to a Ray cluster: starts or joins one, deploys an application, watches and removes it.

Knows nothing about how a stack is planned. Deploys a Serve config and leaves the cluster's other applications alone.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from overfill.errors import OverfillError
from overfill.process.extras import install_line
from overfill.rpc.addresses import is_loopback
from overfill.stack.ray import placement
from overfill.stack.spec import StackSpec

_OBJECT_STORE = 80 << 20  # bytes, approximately Ray's minimum, because the stack does not use the object store
_QUIET = {"log_level": "WARNING"}
_POLL = 0.2
_CONNECT = 5.0  # seconds for a connection to the cluster's head

_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment variable that makes a single-node cluster: Ray listens only on 127.0.0.1 and uses it as its address.

The variable is named after the systems where that is the default. Ray reads it when it is imported.
"""
_FOLDER = "overfill-ray-"
_TRIES = 3  # Ray's start times out after 30 s, which is too little on a busy machine


class RayUnavailable(OverfillError):
    """Ray is not installed, or the cluster cannot be reached or started."""


class RayConnection:
    """A connection to a Ray cluster. Make it with ``start_local`` or ``join``, and end it with ``close``.

    Attributes:
        owned: this process started the cluster, and ``close`` ends it.
    """

    def __init__(self, owned: bool, folder: str | None = None) -> None:
        self.owned = owned
        self._folder = folder

    @classmethod
    def start_local(cls, cpus: int, show_logs: bool) -> RayConnection:
        """Starts a cluster on this machine only, with all ports on loopback. It ends with this process.

        Args:
            cpus: number of CPUs that Ray may hand out.
            show_logs: print the replicas' log lines here.

        Raises:
            RayUnavailable: Ray is not installed or does not start.
        """
        check_installed()
        os.environ |= _LOOPBACK
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if not os.access(os.path.expanduser("~"), os.W_OK):
            # Ray would write a token into the home folder, for commands such as `ray status`.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        _sweep()
        # A short path, because paths of Unix sockets in it are limited to 107 bytes.
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
                        "Ray did not start in time: this machine is too busy or too small; try again, or use --no-ray"
                    ) from error
                if isinstance(error, OSError):
                    raise RayUnavailable(
                        f"Ray cannot start on this machine: {error}; mend that, or use --no-ray"
                    ) from error
                raise
        return cls(True, folder)

    @classmethod
    def join(cls, address: str, show_logs: bool) -> RayConnection:
        """Joins the cluster at ``address``: ``auto``, or HOST:PORT of its head. This machine must be part of it.

        Args:
            show_logs: print the replicas' log lines here.

        Raises:
            RayUnavailable: Ray is not installed, or no cluster answers at the address.
        """
        check_installed()
        _check_head(address)
        try:
            _init(address=address, log_to_driver=show_logs)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise RayUnavailable(f"no Ray cluster at {address}: {error}") from error
        return cls(False)

    def check_room(self, spec: StackSpec) -> None:
        """Raises NoRoom, naming the resource, if the stack's initial replicas do not fit on the cluster's machines."""
        import ray

        machines = [node["Resources"] for node in _machines()]
        placement.check_room(spec, machines if self.owned else _free(machines, ray.available_resources()))

    def check_secret(self, spec: StackSpec) -> None:
        """Raises RayUnavailable if ``spec`` wants a new secret, a file here, and the cluster has other machines."""
        if spec.new_secret and (count := len({node["NodeManagerAddress"] for node in _machines()})) > 1:
            raise RayUnavailable(
                f"the cluster has {count} machines, and the stack's new secret would be a file on this one only: give "
                "--tls FOLDER, which every machine has (`overfill certs FOLDER` makes it); in a document, set tls and "
                "remove new_secret"
            )

    def deploy(self, config: dict[str, Any]) -> None:
        """Deploys the application of a Serve config without waiting until it runs.

        Raises:
            RayUnavailable: an application of that name already runs on the cluster.
        """
        (application,) = config["applications"]
        if application["name"] in self._applications():
            raise RayUnavailable(
                f"an application {application['name']!r} already runs on this cluster: give another --name, or stop it "
                f"with ctrl-C in its `overfill up`, or all applications with `serve shutdown`"
            )
        self._apply([*self._others(application["name"]), application])

    def remove(self, name: str, timeout: float) -> bool:
        """Removes the application and waits for its replicas to drain. Returns True if all ended within ``timeout``."""
        from overfill.stack.ray import directory

        self._apply(self._others(name))
        deadline = time.monotonic() + timeout
        while (there := name in self._applications()) and time.monotonic() < deadline:
            time.sleep(_POLL)
        directory.end(name)
        return not there

    def status(self, name: str) -> Any | None:
        """Returns Serve's ``ApplicationStatusOverview``; None for an unknown application."""
        return self._applications().get(name)

    def alive(self) -> bool:
        """Returns True if the cluster answers."""
        import ray

        try:
            return ray.is_initialized() and bool(_machines())
        except Exception:  # Ray raises various exceptions for an unreachable cluster
            return False

    def close(self) -> None:
        """Disconnects from the cluster, and ends it if this process started it."""
        import ray

        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _applications(self) -> dict[str, Any]:
        from ray import serve

        return dict(serve.status().applications)

    def _others(self, name: str) -> list[dict[str, Any]]:
        """Returns the other applications' configs, because Serve removes applications that a new config omits."""
        details = _controller().get_serve_details()["applications"]
        configs = [app.get("deployed_app_config") for other, app in details.items() if other != name]
        return [config for config in configs if config]

    def _apply(self, applications: list[dict[str, Any]]) -> None:
        from ray.serve.schema import ServeDeploySchema

        # Calls the controller as the dashboard does for `serve deploy`. Serve has no other interface for an
        # application-level policy, and a cluster that ends with this process needs no dashboard.
        schema = {"proxy_location": "Disabled", "logging_config": _QUIET, "applications": applications}
        _controller().deploy_apps(ServeDeploySchema.model_validate(schema))


def check_installed() -> None:
    """Raises RayUnavailable, with the command that installs Ray, if it is missing."""
    if importlib.util.find_spec("ray") is None:
        raise RayUnavailable(
            f"Ray is not installed: run {install_line('server')}, or use plain processes with --no-ray"
        )


def _check_head(address: str) -> None:
    """Raises RayUnavailable if nothing listens at ``address``, because Ray itself would retry for ever.

    Ray replaces a loopback address by this machine's address on the network. If only loopback answers, this function
    sets ``_LOOPBACK``, so that Ray keeps it.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # such as auto: Ray finds the cluster itself
    if is_loopback(host) and _answers(_own_address(), int(port)):
        return
    if not _answers(host, int(port)):
        raise RayUnavailable(f"no Ray cluster at {address}: nothing listens there")
    if is_loopback(host):
        os.environ |= _LOOPBACK


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host.strip("[]"), port), _CONNECT).close()
    except OSError:
        return False
    return True


def _own_address() -> str:
    """Returns this machine's network address, found as Ray does: the source address of the route to an outside host.

    ``connect`` on a UDP socket sends no packet.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _sweep() -> None:
    """Removes temporary folders of killed processes."""
    for folder in glob.glob(f"/tmp/{_FOLDER}*"):
        pid = folder.removeprefix(f"/tmp/{_FOLDER}").partition("-")[0]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(folder, ignore_errors=True)


def _init(**arguments: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if os.environ.get("NO_COLOR") or not (sys.stdout.isatty() and sys.stderr.isatty()):
        os.environ.setdefault(
            "RAY_COLOR_PREFIX", "0"
        )  # disables coloured prefixes of replicas' lines, which go to both streams
    with _signal_handlers_kept():
        import ray
        from ray import serve

        ray.init(logging_level=logging.ERROR, namespace="overfill", **arguments)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=_QUIET)


def _machines() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _controller() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client()


def _free(machines: list[dict[str, float]], available: dict[str, float]) -> list[dict[str, float]]:
    """Returns the free resources as one machine, because Ray reports them only for the whole cluster."""
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
