"""Options of a load test: conflicts, the way to locust, and the number of users over time."""

from __future__ import annotations

import pytest

from overfill.errors import InvalidRequest
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.loadtest.shapes import users_at
from overfill.lab.loadtest.workload import Workload


def test_a_target_without_a_scheme_is_a_router():
    for target in ("127.0.0.1:7600", "grpc://127.0.0.1:7600"):
        plan = LoadPlan(target=target)
        assert (plan.http, plan.address) == (False, "127.0.0.1:7600")
    assert LoadPlan(target="http://127.0.0.1:8000/v1").http


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"target": "127.0.0.1"}, "target"),
        ({"rate": 1.0, "shape": "ramp"}, "rate"),
        ({"shape": "arrivals"}, "shape"),
        ({"rate": 1.0}, "rate"),
        ({"users": 0}, "users"),
        ({"length_scale": 0.0}, "length_scale"),
        ({"objective": "ttft=1"}, "objective"),
        ({"tier": "full=x"}, "tier"),
        ({"tier": "full=0"}, "tier"),
        ({"tier": "Full"}, "tier"),
        ({"tier": "full,full=2"}, "tier"),
    ],
)
def test_contradictions_are_told(options, field):
    with pytest.raises(InvalidRequest) as error:
        LoadPlan(**options)
    assert error.value.field == field


def test_locust_gets_what_differs_under_its_own_names():
    plan = LoadPlan(users=7, tls_cert="a.pem", tls_ca="b.pem", shape="spike", objective="errors=1")
    assert set(plan.locust_argv()) == {
        "--users=7", "--client-tls-cert=a.pem", "--tls-ca=b.pem", "--shape=spike", "--objective=errors=1",
    }  # fmt: skip
    assert LoadPlan().locust_argv() == []
    mixed = LoadPlan.from_options({"tier": ("full", "fast=3"), "fallback": "none", "allow_brownout": True})
    assert set(mixed.locust_argv()) == {"--tier=full,fast=3", "--fallback=none", "--allow-brownout=True"}
    assert LoadPlan.from_locust({"tier": "full,fast=3", "fallback": "none", "allow_brownout": "True"}) == mixed
    # The options as locust's parser returns them, among its own.
    parsed = {"num_users": 7, "client_tls_cert": "a.pem", "tls_ca": "b.pem", "shape": "spike", "objective": "errors=1"}
    assert LoadPlan.from_locust(parsed | {"tls_cert": "of its page", "host": None}) == plan


def test_options_that_locust_has_itself_win_because_its_page_edits_them():
    parsed = {"host": "http://h/v1", "target": "grpc://t:1", "run_time": 30, "duration": 60.0, "num_users": 2}
    plan = LoadPlan.from_locust(parsed)
    assert (plan.target, plan.duration, plan.users) == ("http://h/v1", 30.0, 2)
    # Fields of the page that are left empty, and numbers, which come as text.
    plan = LoadPlan.from_locust({"host": "", "target": "grpc://t:1", "duration": "", "requests": "5"})
    assert (plan.target, plan.duration, plan.requests) == ("grpc://t:1", None, 5)


def test_tiers_are_mixed_by_weight_alike_in_every_process():
    assert LoadPlan().tiers == {"": 1.0}
    assert Workload(LoadPlan()).tier(3) == ""
    plan = LoadPlan(tier="full,fast=3")
    assert plan.tiers == {"full": 1.0, "fast": 3.0}
    named = [Workload(plan).tier(ordinal) for ordinal in range(400)]
    assert 250 < named.count("fast") < 350
    assert named.count("full") == 400 - named.count("fast")
    assert named == [Workload(plan).tier(ordinal) for ordinal in range(400)]


def test_a_key_is_in_no_option(monkeypatch):
    monkeypatch.setenv("OVERFILL_API_KEY", "secret")
    plan = LoadPlan()
    assert plan.api_key == "secret"
    assert "secret" not in f"{plan}{plan.locust_argv()}"


def test_users_over_time():
    def users(shape, max_users=10):
        return [users_at(shape, elapsed, 100.0, max_users) for elapsed in range(0, 110, 10)]

    assert users("constant") == users("soak") == [10] * 10 + [None]
    assert users("ramp") == [*range(1, 11), None]
    assert users("spike") == [1, 1, 1, 1, 10, 10, 1, 1, 1, 1, None]
    assert users("ramp", max_users=2) == [1] * 5 + [2] * 5 + [None]
    assert users("spike", max_users=1)[4] == 1
