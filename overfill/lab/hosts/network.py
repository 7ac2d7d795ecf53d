"""Makes hosts: network namespaces on a bridge, each with an address and a link that can be slow, lossy or down.

Needs Linux, root, and the programs ``ip`` and ``nsenter``. A host shares files, memory and process ids with
this machine; only its network is apart. Workers offer each other shared memory over abstract Unix sockets, which end at
a network namespace, so KV has to cross the link.

The bridge has a namespace of its own, so that this machine's packet filter (such as Docker's) does not see its frames.
This machine is on the bridge too, so that clients here reach the hosts.

A host's link has one device in its namespace (``eth0``) and one on the bridge. A process of ``relay.c`` carries the
frames between the two, and limits, delays and drops them. netem is not used: kernels may be built without it.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from overfill.errors import OverfillError
from overfill.process.compiled import C_COMPILERS, find_compiler

_SOURCE = Path(__file__).with_name("relay.c")
_PROGRAMS = {"ip": "iproute2", "nsenter": "util-linux"}  # program -> Debian's package
_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_TIMEOUT = 30.0  # seconds for one command

# Removes bridge and namespaces when its stdin ends. The kernel closes its stdin when this process dies.
_REMOVE = """
cat > /dev/null
ip link del "$DEVICE"
for space in $SPACES; do ip netns del "$space"; done
"""


class CannotMakeHosts(OverfillError):
    """Hosts cannot be made here. The message names what is missing, or the command that failed."""


class Host:
    """One host of ``make_hosts``. The last three attributes, of its link, may be set while processes run on it.

    Attributes:
        name: Name of its network namespace.
        address: IPv4 address of ``eth0``.
        device: Name of the link's end on the bridge. With another letter it has at most the kernel's 15 characters.
        delay: Seconds that each frame takes on the link, one way.
        loss: Share of the frames that are lost in each direction, 0 to 1.
        rate: Bytes per second in each direction; None means no limit.
    """

    delay: float = 0.0
    loss: float = 0.0
    rate: float | None = None

    def __init__(self, number: int, name: str, address: str, switch: str, relay: Path) -> None:
        self.name = name
        self.address = address
        self._number = number
        self.device = f"of{os.getpid()}-{number}"
        self._switch = switch
        self._program = relay
        self._relay: subprocess.Popen[bytes] | None = None

    @property
    def enter(self) -> list[str]:
        """Command prefix with which a command runs on this host. It keeps its process id."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--"]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("delay", "loss", "rate"):
            assert self._relay is not None
            assert self._relay.stdin is not None
            settings = round(self.delay * 1e9), self.loss, self.rate or 0
            self._relay.stdin.write(b"%d %.9f %.0f\n" % settings)
            self._relay.stdin.flush()

    def partition(self) -> None:
        """Takes the link down: nothing leaves or reaches the host, and its address is silent."""
        run(f"ip -n {self._switch} link set {self.device} down")

    def heal(self) -> None:
        """Takes the link up again."""
        run(f"ip -n {self._switch} link set {self.device} up")

    def reboot(self) -> None:
        """Replaces the host by a new one with the same name and address, which knows no old connection.

        Call it when no process runs on the host. The quality of the link is again that of a new host.
        """
        self.stop()
        run(f"ip netns del {self.name}")
        vars(self).update(delay=0.0, loss=0.0, rate=None)
        self.create()

    def create(self) -> None:
        """Makes the namespace and its link."""
        inside, space = f"{self.device}h", self.name
        run(f"ip netns add {space}")
        with ExitStack() as files:
            ends = [files.enter_context(_open_tap(device)) for device in (inside, self.device)]
            command = [str(self._program), *map(str, ends), str(self._number)]
            self._relay = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=ends, process_group=0)
        _connect(self.device, self._switch)
        mac = f"02:00:00:00:00:{self._number:02x}"  # the same after a reboot: peers remember it for seconds
        run(
            f"ip link set {inside} netns {space} name eth0 address {mac}",
            f"ip -n {space} address add {self.address}/24 dev eth0",
            f"ip -n {space} link set lo up",
            f"ip -n {space} link set eth0 up",
        )

    def stop(self) -> None:
        """Ends the process that carries the link's frames. Its devices go with it."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.communicate()


@contextmanager
def make_hosts(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Makes a host for each of ``names`` on a new bridge, yields them by name, and removes all of it at the end.

    Their namespaces are ``overfill-PID-NAME``.

    Raises:
        CannotMakeHosts: On entry, when something is missing or a command fails; nothing is left behind.
    """
    check_requirements()
    switch, device = f"overfill-{os.getpid()}", f"of{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="overfill-hosts-") as folder:
        relay = Path(folder) / "relay"
        run(shlex.join([find_compiler(C_COMPILERS) or "", "-O2", "-o", str(relay), str(_SOURCE)]))
        subnet = free_subnet([route["dst"] for route in json.loads(run("ip -json route") or "[]")])
        hosts = {
            name: Host(number, f"{switch}-{name}", f"{subnet}.{number + 2}", switch, relay)
            for number, name in enumerate(names)
        }
        with _removal(device, [*(host.name for host in hosts.values()), switch]), ExitStack() as stops:
            run(
                f"ip netns add {switch}",
                f"ip -n {switch} link add bridge type bridge",
                f"ip -n {switch} link set bridge up",
                f"ip link add {device} type veth peer name {device}b",
            )
            _connect(f"{device}b", switch)
            run(f"ip address add {subnet}.1/24 dev {device}", f"ip link set {device} up")
            for host in hosts.values():
                stops.callback(host.stop)
                host.create()
            yield hosts


@contextmanager
def _removal(device: str, spaces: Sequence[str]) -> Iterator[None]:
    """Removes everything at the end, by a process that does it too when this process is killed."""
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
        remover.communicate(timeout=_TIMEOUT)


def _connect(device: str, switch: str) -> None:
    """Puts a device of this machine on the bridge."""
    run(
        f"ip link set {device} netns {switch}",
        f"ip -n {switch} link set {device} master bridge",
        f"ip -n {switch} link set {device} up",
    )


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


def run(*commands: str) -> str:
    """Runs commands, written as in a shell, one after the other, and returns the last one's output.

    Raises:
        CannotMakeHosts: A command failed; the message has its own words.
    """
    output = ""
    for command in commands:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        if done.returncode != 0:
            said = " ".join(done.stderr.split()) or f"it exited with status {done.returncode}"
            raise CannotMakeHosts(f"`{command}` failed: {said}")
        output = done.stdout
    return output


@contextmanager
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
