"""Tests what a stack on several machines lacks: an open host and its files, or a secret that all machines have."""

from __future__ import annotations

from typing import Any

import pytest

from overfill.stack.ray import connection
from overfill.stack.spec import StackSpec

FILES = {f"tls_{name}": name for name in ("cert", "key", "ca")} | {"api_keys": "keys.json"}
OPEN = FILES | {"host": "0.0.0.0", "advertise": "worker"}


@pytest.mark.parametrize(
    ("settings", "worker", "closed"),
    [
        ({}, {}, "127.0.0.1 of router, 127.0.0.1 of prefill, 127.0.0.1 of decode is"),
        (OPEN, {"host": "127.0.0.1"}, "settings.host: 127.0.0.1 of decode is"),
    ],
)
def test_several_machines_need_open_hosts_and_all_files(
    settings: dict[str, Any], worker: dict[str, Any], closed: str
) -> None:
    app = pytest.importorskip("services.ray.app", reason="needs Ray")
    spec = StackSpec(pair="p", settings=settings, decode={"settings": worker})
    app.check_reachable(spec, 1)
    app.check_reachable(StackSpec(pair="p", settings=OPEN), 2)
    with pytest.raises(ValueError, match=r"and api_keys, tls_cert, tls_key and tls_ca to files on every machine") as it:
        app.check_reachable(spec, 2)
    assert closed in str(it.value)


def test_a_new_secret_does_not_lie_on_one_of_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    made = StackSpec(pair="p", ray_address="auto", new_secret=True, settings={"api_keys": "keys.json"})
    joined = connection.RayConnection(owned=False)
    one, other = {"NodeManagerAddress": "10.0.0.1"}, {"NodeManagerAddress": "10.0.0.2"}
    monkeypatch.setattr(connection, "_machines", lambda: [one, one])  # two of Ray's nodes on one machine
    joined.check_secret(made)
    monkeypatch.setattr(connection, "_machines", lambda: [one, other])
    with pytest.raises(connection.RayUnavailable, match=r"the cluster has 2 machines.*--tls FOLDER"):
        joined.check_secret(made)
    joined.check_secret(made.model_copy(update={"new_secret": False}))
