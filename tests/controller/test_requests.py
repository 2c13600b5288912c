"""controller.requests: every class of bad request gets Cloud Hypervisor's status and an error array."""

from __future__ import annotations

import json

import pytest

from controller import requests
from controller.api.endpoints import ENDPOINTS
from shared.errors import ConfigError, DuplicateIdError, FlotillaError, NotFoundError, StateError
from shared.reactor import Reactor

SECONDS = 60.0


def ask(verb, method, name, body=b""):
    loop = Reactor()
    try:
        answer = loop.run_until(requests.answer({name: verb} if verb else {}, method, name, body), SECONDS)
    finally:
        loop.close()
    return answer["status"], json.loads(answer["body"]) if answer["body"] else None


def giving(value):
    async def verb(_):
        return value

    return verb


def raising(error):
    async def verb(_):
        raise error

    return verb


def wrapped(inner):
    outer = FlotillaError("outer")
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.name)
def test_success_has_the_status_of_the_table(endpoint):
    body = b"{}" if endpoint.body else b""
    status, content = ask(giving({"a": 1}), endpoint.method, endpoint.name, body)
    assert status == endpoint.success
    assert content == ({"a": 1} if endpoint.success == 200 else None)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 400),
        (DuplicateIdError("x"), 409),
        (NotFoundError("x"), 404),
        (StateError("x"), 500),
        (wrapped(ConfigError("x")), 400),
        (OSError(5, "x"), 500),
    ],
    ids=["config", "duplicate", "not-found", "state", "wrapped-config", "os"],
)
def test_error_class_decides_the_status(error, status):
    assert ask(raising(error), "PUT", "vm.boot")[0] == status


def test_error_body_lists_the_chain_outermost_first():
    assert ask(raising(wrapped(ConfigError("inner", "hint"))), "PUT", "vm.boot")[1] == [
        "Error from API",
        "outer",
        "inner (hint)",
    ]


def test_unknown_path_is_404():
    assert ask(None, "GET", "vm.nonsense")[0] == 404


def test_wrong_verb_is_400_and_names_the_right_one():
    status, body = ask(giving(None), "GET", "vm.boot")
    assert status == 400 and "PUT" in body[1]


def test_body_where_none_belongs_is_400():
    status, body = ask(giving(None), "PUT", "vm.boot", b"{}")
    assert status == 400 and "takes no request body" in body[1]


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000], ids=["cut", "not-utf8", "deep"])
def test_malformed_json_is_400(body):
    status, content = ask(giving(None), "PUT", "vm.create", body)
    assert status == 400 and "not JSON" in content[1]


def test_missing_body_is_400():
    assert ask(giving(None), "PUT", "vm.create")[0] == 400


def test_error_that_repeats_half_of_a_surrogate_pair_is_told():
    """JSON has such strings, UTF-8 has not."""
    assert ask(raising(ConfigError("there is no \ud800")), "GET", "vm.info") == (
        400, ["Error from API", "there is no ?"]
    )  # fmt: skip
