"""Makes hosts: network namespaces on a bridge, each with an address and a link that can be slow, lossy or down.

Needs Linux, root, and the programs ``ip``, ``tc`` and ``nsenter``. A host shares files, memory and process ids with
this machine; only its network is apart. Workers offer each other shared memory over abstract Unix sockets, which end at
a network namespace, so KV has to cross the link.

The bridge has a namespace of its own, so that this machine's packet filter (such as Docker's) does not see its frames.
This machine is on the bridge too, so that clients here reach the hosts.

A host's link has one device in its namespace (``eth0``) and one on the bridge. The kernel's tbf limits the rate at both
devices. netem is not used, because kernels may be built without it: ``relay.c`` delays and drops frames instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from overfill.errors import OverfillError
from overfill.process.compiled import C_COMPILERS, find_compiler

_SOURCE = Path(__file__).with_name("relay.c")
_PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux"}  # program -> Debian's package
_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_TIMEOUT = 30.0  # seconds for one command
_QUEUE_SECONDS, _MIN_QUEUE = 0.1, 64 * 1024  # queue in front of a limited rate, in seconds and at least in bytes
_BURST_SECONDS, _MIN_BURST = 0.002, 16 * 1024  # what may pass at once

# Removes bridge and namespaces when its stdin ends. The kernel closes its stdin when this process dies.
_REMOVE = """
cat > /dev/null
ip link del "$DEVICE"
for space in $SPACES; do ip netns del "$space"; done
"""


class CannotMakeHosts(OverfillError):
    """Hosts cannot be made here. The message names what is missing, or the command that failed."""


class Host:
    """One host of a ``HostNetwork``. Its link can be changed while processes run on it.

    Setting a property of the link raises CannotMakeHosts when the kernel refuses it.

    Attributes:
        name: Name of its network namespace.
        address: IPv4 address of ``eth0``.
        device: Name of the link's end on the bridge. With another letter it has at most the kernel's 15 characters.
    """

    def __init__(self, number: int, name: str, address: str, network: HostNetwork) -> None:
        self.name = name
        self.address = address
        self._number = number
        self.device = f"of{os.getpid()}-{number}"
        self._network = network
        self._delay = self._loss = 0.0
        self._rate: float | None = None
        self._relay: subprocess.Popen[bytes] | None = None

    @property
    def enter(self) -> list[str]:
        """Command prefix with which a command runs on this host. It keeps its process id."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--"]

    @property
    def delay(self) -> float:
        """Seconds that each frame takes on the link, one way."""
        return self._delay

    @delay.setter
    def delay(self, seconds: float) -> None:
        self._delay = seconds
        self._set_relay()

    @property
    def loss(self) -> float:
        """Share of the frames that are lost in each direction, 0 to 1."""
        return self._loss

    @loss.setter
    def loss(self, share: float) -> None:
        self._loss = share
        self._set_relay()

    @property
    def rate(self) -> float | None:
        """Bytes per second in each direction; None means no limit."""
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        if rate != self._rate:
            self._rate = rate
            for space, device in ((self.name, "eth0"), (self._network.switch, self.device)):
                run_command(rate_command(space, device, rate))

    def partition(self) -> None:
        """Takes the link down: nothing leaves or reaches the host, and its address is silent."""
        run_command(["ip", "-n", self._network.switch, "link", "set", self.device, "down"])

    def heal(self) -> None:
        """Takes the link up again."""
        run_command(["ip", "-n", self._network.switch, "link", "set", self.device, "up"])

    def reboot(self) -> None:
        """Replaces the host by a new one with the same name and address, which knows no old connection.

        Call it when no process runs on the host. The quality of the link is again that of a new host.
        """
        self.stop()
        run_command(["ip", "netns", "del", self.name])
        self._delay = self._loss = 0.0
        self._rate = None
        self.create()

    def create(self) -> None:
        """Makes the namespace and its link."""
        run_command(["ip", "netns", "add", self.name])
        inside = f"{self.device}h"
        with ExitStack() as files:
            ends = [files.enter_context(_open_tap(device)) for device in (inside, self.device)]
            command = [str(self._network.relay), *map(str, ends), str(self._number)]
            self._relay = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=ends, process_group=0)
        run_commands(bridge_commands(self.device, self._network.switch))
        mac = f"02:00:00:00:00:{self._number:02x}"  # the same after a reboot: peers remember it for seconds
        run_commands(eth0_commands(inside, self.name, mac, self.address))

    def _set_relay(self) -> None:
        assert self._relay is not None
        assert self._relay.stdin is not None
        self._relay.stdin.write(b"%d %.9f\n" % (round(self._delay * 1e9), self._loss))
        self._relay.stdin.flush()

    def stop(self) -> None:
        """Ends the process that carries the link's frames. Its devices go with it."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.communicate()


class HostNetwork:
    """Makes a host for each of ``names`` on a new bridge, and removes all of it at the end.

    Args:
        names: Names of the hosts. Their namespaces are ``overfill-PID-NAME``.

    Raises:
        CannotMakeHosts: On entry, when something is missing or a command fails; nothing is left behind.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._exits = ExitStack()
        self.hosts: dict[str, Host] = {}
        self.relay: Path | None = None
        self.switch = f"overfill-{os.getpid()}"

    def __enter__(self) -> HostNetwork:
        check_requirements()
        with ExitStack() as exits:
            folder = exits.enter_context(tempfile.TemporaryDirectory(prefix="overfill-hosts-"))
            self.relay = _compile_relay(Path(folder))
            subnet = free_subnet(_routes())
            for number, name in enumerate(self._names):
                self.hosts[name] = Host(number, f"{self.switch}-{name}", f"{subnet}.{number + 2}", self)
            device = f"of{os.getpid()}"  # with a number and a letter it has at most the 15 characters that it may have
            exits.enter_context(self._removal(device))
            run_command(["ip", "netns", "add", self.switch])
            run_command(["ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge"])
            run_command(["ip", "-n", self.switch, "link", "set", "bridge", "up"])
            run_command(["ip", "link", "add", device, "type", "veth", "peer", "name", f"{device}b"])
            run_commands(bridge_commands(f"{device}b", self.switch))
            run_command(["ip", "address", "add", f"{subnet}.1/24", "dev", device])
            run_command(["ip", "link", "set", device, "up"])
            for host in self.hosts.values():
                host.create()
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()

    @contextlib.contextmanager
    def _removal(self, device: str) -> Iterator[None]:
        """Removes everything at the end, by a process that does it too when this process is killed."""
        spaces = [*(host.name for host in self.hosts.values()), self.switch]
        remover = subprocess.Popen(
            ["sh", "-c", _REMOVE],
            env=dict(os.environ) | {"DEVICE": device, "SPACES": " ".join(spaces)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C does not reach it
        )
        try:
            yield
        finally:
            for host in self.hosts.values():
                host.stop()
            remover.communicate(timeout=_TIMEOUT)


def check_requirements() -> None:
    """Raises CannotMakeHosts that names the first thing that is missing: root, a program, a device, a compiler."""
    if os.geteuid() != 0:
        raise CannotMakeHosts("hosts are network namespaces, which only root can make: run this command as root")
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise CannotMakeHosts(f"the program {program} is missing, which makes hosts: install {package}")
    if not _TUN.exists():
        raise CannotMakeHosts(f"{_TUN} is missing, so no link can delay or lose frames: load the kernel's module tun")
    if find_compiler(C_COMPILERS) is None:
        raise CannotMakeHosts(
            f"a C compiler is missing, which builds the links: install one of {', '.join(C_COMPILERS)}"
        )


def free_subnet(routes: Sequence[str]) -> str:
    """Returns the first three numbers of a subnet 10.A.B.0/24 that none of this machine's ``routes`` begins with."""
    choice = random.SystemRandom()
    while True:
        subnet = f"10.{choice.randrange(64, 256)}.{choice.randrange(256)}"
        if not any(route.startswith(f"{subnet}.") for route in routes):
            return subnet


def eth0_commands(device: str, space: str, mac: str, address: str) -> list[list[str]]:
    """Returns the commands that make ``device`` the device eth0 of a namespace, with its two addresses."""
    return [
        ["ip", "link", "set", device, "netns", space, "name", "eth0", "address", mac],
        ["ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0"],
        ["ip", "-n", space, "link", "set", "lo", "up"],
        ["ip", "-n", space, "link", "set", "eth0", "up"],
    ]


def bridge_commands(device: str, space: str) -> list[list[str]]:
    """Returns the commands that put ``device`` on the bridge of a namespace."""
    return [
        ["ip", "link", "set", device, "netns", space],
        ["ip", "-n", space, "link", "set", device, "master", "bridge"],
        ["ip", "-n", space, "link", "set", device, "up"],
    ]


def rate_command(space: str, device: str, rate: float | None) -> list[str]:
    """Returns the command that limits what ``device`` sends to ``rate`` bytes per second; None ends the limit."""
    if rate is None:
        return ["tc", "-n", space, "qdisc", "del", "dev", device, "root"]
    limits = {
        "rate": f"{round(8 * rate)}bit",
        "burst": str(max(_MIN_BURST, round(rate * _BURST_SECONDS))),
        "limit": str(max(_MIN_QUEUE, round(rate * _QUEUE_SECONDS))),
    }
    tbf = [word for limit in limits.items() for word in limit]
    return ["tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *tbf]


def run_command(command: Sequence[str]) -> str:
    """Runs a command and returns its output. Raises CannotMakeHosts when it fails, with the command's own words."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"it exited with status {done.returncode}"
        if "tbf" in command and "qdisc kind is unknown" in said:
            said = "this kernel has no tbf, which limits rates: load its module sch_tbf"
        raise CannotMakeHosts(f"`{' '.join(command)}` failed: {said}")
    return done.stdout


def run_commands(commands: Iterable[Sequence[str]]) -> None:
    """Runs commands one after the other. Raises CannotMakeHosts when one fails."""
    for command in commands:
        run_command(command)


@contextlib.contextmanager
def _open_tap(name: str) -> Iterator[int]:
    """Makes a TAP device and yields its file. The device exists as long as a process has the file open."""
    file = os.open(_TUN, os.O_RDWR)
    try:
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        yield file
    except OSError as error:
        raise CannotMakeHosts(f"cannot make the TAP device {name}: {error.strerror}") from error
    finally:
        os.close(file)


def _compile_relay(folder: Path) -> Path:
    compiler, relay = find_compiler(C_COMPILERS), folder / "relay"
    assert compiler is not None
    run_command([compiler, "-O2", "-o", str(relay), str(_SOURCE)])
    return relay


def _routes() -> list[str]:
    return [route["dst"] for route in json.loads(run_command(["ip", "-json", "route"]) or "[]")]
