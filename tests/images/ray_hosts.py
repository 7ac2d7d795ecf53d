"""A Ray cluster whose machines are containers on a network of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml
from runtime import IMAGES, PREFIX, docker
from stacks import wait_until

NAME = f"{PREFIX}ray"
_SUBNET = "10.213.77"
_START = 300  # seconds; on a busy machine, Ray misses its own limit of 30 s, and docker starts it again


class RayHosts:
    """A head, which runs no replica, and worker machines that ``add`` starts, inside a ``with`` block.

    Args:
        files: folder that worker machines mount at /etc/overfill.
        pair: the pair's folder, which worker machines mount at /pair.
        config: folder of the Serve config, the only one that the head mounts.
        token: token of Ray's authentication.
    """

    def __init__(self, files: Path, pair: Path, config: Path, token: str) -> None:
        self._config, self._token = config, token
        self._mounts = [f"--volume={pair}:/pair:ro", f"--volume={files}:/etc/overfill:ro"]
        self._machines: list[str] = []

    def __enter__(self) -> Self:
        docker("network", "create", "--internal", f"--subnet={_SUBNET}.0/24", NAME)
        try:
            mount = f"--volume={self._config}:/config:ro"
            self._start("head", 0, [mount], "--head", "--num-cpus=0", "--dashboard-host=127.0.0.1")
            self._wait_started("head")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for machine in self._machines:
            docker("rm", "--force", "--volumes", machine, check=False)
        docker("network", "rm", NAME)

    def add(self, *numbers: int) -> None:
        """Starts the worker machines and waits until they are part of the cluster. Each has room for every replica."""
        for number in numbers:
            address = f"--address={_SUBNET}.10:6379"
            self._start(f"worker-{number}", number, self._mounts, address, "--num-cpus=2")
        for number in numbers:
            self._wait_started(f"worker-{number}")

    def kill(self, number: int) -> None:
        """Ends all processes of a worker machine. Its address does not answer any more."""
        docker("kill", f"{NAME}-worker-{number}")

    def deploy(self, config: dict[str, Any]) -> None:
        """Runs ``serve deploy`` on the head."""
        (self._config / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        docker("exec", f"{NAME}-head", "serve", "deploy", "/config/serve.yaml", "--address=http://127.0.0.1:8265")

    def logs(self) -> str:
        """Returns the last lines of Serve's controller and of every replica on the machines that run."""
        command = "tail -n 25 /tmp/ray/session_latest/logs/serve/*.log /tmp/ray/session_latest/logs/worker-*.err"
        machines = docker("ps", f"--filter=name={NAME}-", "--format={{.Names}}").split()
        return "\n".join(docker("exec", machine, "sh", "-c", command, check=False) for machine in machines)

    def _start(self, name: str, number: int, mounts: list[str], *arguments: str) -> None:
        machine = f"{NAME}-{name}"
        self._machines.append(machine)
        docker(
            *("run", "--detach", "--restart=on-failure", f"--name={machine}", f"--hostname={machine}"),
            *(f"--network={NAME}", f"--ip={host(number)}"),
            # Ray writes to /tmp and /dev/shm.
            *("--read-only", "--tmpfs=/tmp:exec,mode=1777", "--shm-size=256m"),
            *("--cap-drop=ALL", "--security-opt=no-new-privileges"),
            *("--env=RAY_AUTH_MODE=token", f"--env=RAY_AUTH_TOKEN={self._token}", "--env=OMP_NUM_THREADS=1"),
            *(*mounts, IMAGES["ray"], "ray", "start", "--block", "--object-store-memory=80000000", *arguments),
        )

    def _wait_started(self, name: str) -> None:
        started = "Ray runtime started"
        wait_until(lambda: started in docker("logs", f"{NAME}-{name}"), _START, f"Ray runs on {name}", pause=0.5)


def host(number: int) -> str:
    """Returns the address of a machine; the head has number 0."""
    return f"{_SUBNET}.{10 + number}"
