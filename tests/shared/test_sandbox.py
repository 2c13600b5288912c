"""shared.sandbox: what each profile leaves to a real process, as /proc tells it."""

from __future__ import annotations

import os

import pytest

from controller.fleet import WorkerSpec
from shared.sandbox import PROFILES, confine
from tests.controller.processes import SECONDS, running

CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")


@pytest.fixture
def start(tmp_path):
    with running(str(tmp_path)) as (reactor, fleet):

        def make(profile):
            spec = WorkerSpec("toy", "_toy0", "tests.toy_worker", profile)
            return reactor.run_until(fleet.start(spec, {}, lambda _: None), SECONDS).pid

        yield make


def status(pid):
    with open(f"/proc/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def limits(pid):
    with open(f"/proc/{pid}/limits") as file:
        return {line[:25].strip(): line[25:].split()[:2] for line in file}


def network(pid):
    return os.readlink(f"/proc/{pid}/ns/net")


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_profile(start, profile):
    pid = start(profile)
    assert status(pid)["NoNewPrivs"] == "1"
    assert limits(pid)["Max core file size"] == ["0", "0"]
    assert limits(pid)["Max open files"] == [str(PROFILES[profile].open_files)] * 2


@pytest.mark.parametrize("profile", [name for name, profile in PROFILES.items() if not profile.capabilities])
def test_no_capability_is_left(start, profile):
    found = status(start(profile))
    for name in CAPABILITY_SETS:
        assert int(found[name], 16) == 0, name
    if os.geteuid() == 0:  # a bounding set can only be changed with CAP_SETPCAP
        assert int(found["CapBnd"], 16) == 0


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_only_profiles_with_a_network_see_the_vms(start, profile):
    if os.geteuid() != 0:
        pytest.skip("a network namespace of its own needs CAP_SYS_ADMIN, which this run has not got")
    pid = start(profile)
    assert (network(pid) == network(os.getpid())) is PROFILES[profile].network
    with open(f"/proc/{pid}/net/dev") as file:
        devices = [line.partition(":")[0].strip() for line in file if ":" in line]
    if not PROFILES[profile].network:
        assert devices == ["lo"]


def test_workers_have_no_network_and_no_capabilities():
    assert not PROFILES["worker"].network and not PROFILES["worker"].capabilities


def test_an_unknown_profile_is_an_error_before_anything_is_given_up():
    before = status(os.getpid())["NoNewPrivs"]
    with pytest.raises(KeyError):
        confine("none")
    assert status(os.getpid())["NoNewPrivs"] == before
