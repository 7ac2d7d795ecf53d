"""Tests that a placed plan has addresses of hosts, mutual TLS and API keys, and passes the services' own checks."""

from __future__ import annotations

from described import placed

from overfill.api import key_file as keys
from overfill.lab.hosts.place import place
from overfill.rpc import certificates


def test_each_process_has_its_host_and_mutual_tls(tmp_path):
    certificates.make(tmp_path)
    key_file = tmp_path / "api-keys.json"
    keys.create(key_file, "lab")
    names = ["router-0", "router-1", "prefill-0", "decode-0"]
    addresses = {name: f"10.64.0.{number + 2}" for number, name in enumerate(names)}
    plan = place(placed(pair=tmp_path, routers=2, threads=1), addresses, tmp_path, key_file)
    assert plan.addresses == ("10.64.0.2:7600", "10.64.0.3:7600")
    for config in (*plan.routers, *plan.prefill, *plan.decode):
        assert config.tls_ca is not None
        assert type(config).of(config.settings()) == config  # as the service does, with all checks of an open host
    for worker in (*plan.prefill, *plan.decode):
        assert worker.routers == plan.addresses
        assert worker.host == addresses[worker.worker_id]
    assert plan.client_tls.name == "overfill"
