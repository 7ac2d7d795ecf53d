"""What is said when hosts cannot be made, and the commands that make them. No root."""

from __future__ import annotations

import pytest

from overfill.lab.hosts import network
from overfill.lab.hosts.network import CannotMakeHosts, Host, make_hosts


@pytest.fixture
def as_root(monkeypatch):
    """This process seems to be root's, on a machine that has everything."""
    monkeypatch.setattr(network.os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda program: f"/usr/sbin/{program}")
    monkeypatch.setattr(network, "find_compiler", lambda names: "/usr/bin/cc")


def test_without_root_the_error_says_so(as_root, monkeypatch):
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    with pytest.raises(CannotMakeHosts, match="which only root can make: run this command as root"), make_hosts(["a"]):
        pass


@pytest.mark.parametrize(("program", "package"), [("ip", "iproute2"), ("nsenter", "util-linux")])
def test_a_missing_program_is_named_with_its_package(as_root, monkeypatch, program, package):
    monkeypatch.setattr(network.shutil, "which", lambda name: None if name == program else f"/usr/sbin/{name}")
    with pytest.raises(CannotMakeHosts, match=f"the program {program} is missing, .*: install {package}"):
        network.check_requirements()


def test_what_the_links_need_is_named_when_it_is_missing(as_root, monkeypatch, tmp_path):
    monkeypatch.setattr(network, "_TUN", tmp_path / "tun")
    with pytest.raises(CannotMakeHosts, match=r"tun is missing.*load the kernel's module tun"):
        network.check_requirements()
    (tmp_path / "tun").touch()
    monkeypatch.setattr(network, "find_compiler", lambda names: None)
    with pytest.raises(CannotMakeHosts, match=r"a C compiler is missing.*: install one of cc, gcc, clang"):
        network.check_requirements()


def test_names_of_devices_fit_the_kernel_for_every_process_id(monkeypatch, tmp_path):
    monkeypatch.setattr(network.os, "getpid", lambda: 4_194_304)  # Linux's largest
    device = Host(99, "h", "10.64.0.2", "switch", tmp_path / "relay").device
    assert len(f"{device}h") <= 15


def test_a_subnet_that_this_machine_uses_is_not_taken(monkeypatch):
    numbers = iter([64, 0, 70, 3])
    monkeypatch.setattr(network.random.SystemRandom, "randrange", lambda *_: next(numbers))
    assert network.free_subnet(["default", "10.64.0.0/24"]) == "10.70.3"
