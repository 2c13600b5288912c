"""ch_remote.migration: the argument of send-migration and receive-migration."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch_remote.migration import receive_body, send_body
from shared.errors import ConfigError


def test_all_keys_of_a_send() -> None:
    text = "destination_url=unix:/s,local=on,downtime_ms=200,timeout_s=60,timeout_strategy=ignore"
    assert send_body(text) == {
        "destination_url": "unix:/s",
        "local": True,
        "downtime_ms": 200,
        "timeout_s": 60,
        "timeout_strategy": "Ignore",
    }


def test_keys_that_change_nothing_are_accepted_and_not_sent() -> None:
    text = "destination_url=tcp:h:1,preserve_source=off,connections=1,memory_mode=precopy,tls_dir="
    assert send_body(text) == {"destination_url": "tcp:h:1", "local": False}
    assert receive_body("receiver_url=unix:/s,memory_mode=precopy") == {"receiver_url": "unix:/s"}


def test_quotes_protect_commas() -> None:
    assert receive_body('receiver_url="unix:/a,b"') == {"receiver_url": "unix:/a,b"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "destination_url=unix:<path>"),
        ("/tmp/sock", "/tmp/sock"),
        ("local=on", "destination_url is missing"),
        ("destination_url=", "destination_url is missing"),
        ("destination_url=unix:", "unix:"),
        ("destination_url=file:///x", "file:///x"),
        ("unix:", "unix:"),
        ("tcp:host", "tcp:host"),
        ("tcp:host:99999", "tcp:host:99999"),
        ("tcp::1", "tcp::1"),
        ("unix:/s,local=on", "destination_url=unix:/s,local=on"),
        ("destination_url=unix:/s,speed=1", "Unknown option: speed"),
        ("destination_url=unix:/s,local=maybe", "maybe"),
        ("destination_url=unix:/s,downtime_ms=0", "downtime_ms"),
        ("destination_url=unix:/s,timeout_s=-1", "timeout_s"),
        ("destination_url=unix:/s,timeout_strategy=retry", "timeout_strategy is cancel or ignore"),
        ("destination_url=unix:/s,local=on,local=off", "local is given twice"),
        ("destination_url=tcp:h:1,local=on", "tcp:h:1"),
        ("destination_url=unix:/s,connections=2", "connections=2 is not available yet"),
        ("destination_url=unix:/s,preserve_source=on", "preserve_source=on is not available yet"),
        ("destination_url=unix:/s,memory_mode=postcopy", "memory_mode=postcopy is not available yet"),
        ("destination_url=tcp:h:1,tls_dir=/x", "tls_dir=/x is not available yet"),
        ('destination_url="unix:/s', "quote"),
    ],
)
def test_bad_sends_are_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        send_body(text)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("destination_url=unix:/s", "Unknown option: destination_url"),
        ("receiver_url=unix:/s,zone_updates=[a@1]", "zone_updates=[a@1] is not available yet"),
        ("receiver_url=unix:/s,vfio_fds=[a@1]", "vfio_fds=[a@1] is not available yet"),
    ],
)
def test_bad_receives_are_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        receive_body(text)
    assert named in str(caught.value)


def test_local_flag_against_local_off_is_refused() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        send_body("destination_url=unix:/s,local=off", local_flag=True)


def test_local_flag_with_tcp_is_refused() -> None:
    with pytest.raises(ConfigError, match="tcp:h:1"):
        send_body("tcp:h:1", local_flag=True)


@given(st.text(alphabet='unixtcp:/=,"[]@1 localdesturl_', max_size=60) | st.text(max_size=40))
def test_any_text_is_a_body_or_a_config_error(text: str) -> None:
    for parse, key in ((send_body, "destination_url"), (receive_body, "receiver_url")):
        try:
            body = parse(text)
        except ConfigError:
            continue
        assert body[key].startswith(("unix:", "tcp:"))
