"""What a scrape tells of a network card under load."""

from __future__ import annotations

import pytest

from tests.netpeer import Echo, ping
from tests.probe.net.rig import GUEST, HOST, guest
from tests.prometheus import at, total, until

pytestmark = pytest.mark.probe


def frames(found):
    return total(found, "device_operations_total", device="card")


def test_frames_and_bytes_of_a_card_rise_with_its_traffic(tmp_path):
    path = tmp_path / "figures"
    card = [f"ip={HOST},id=card"]
    with guest(tmp_path, "mode=net report_ms=0", "--metrics-socket", str(path), net=card) as vmm:
        ping(GUEST)
        with Echo(GUEST) as echo:
            echo.until_answered(20)
            first = until(path, lambda f: frames(f) > 10)
            echo.until_answered(100)
            again = until(path, lambda f: frames(f) > frames(first) + 50)
        for name in ("operations_total", "bytes_total"):
            for operation in ("receive", "transmit"):
                values = [at(f, f"device_{name}", device="card", operation=operation) or 0 for f in (first, again)]
                assert values[1] > values[0] > 0
        assert (at(again, "device_bytes_total", device="card", operation="receive") or 0) > 60 * (
            at(again, "device_operations_total", device="card", operation="receive") or 0
        )
        assert at(again, "device_errors_total", device="card", error="malformed") == 0
        assert at(again, "process_pss_bytes", process="card", kind="net")
        assert b"BAD" not in vmm.output
