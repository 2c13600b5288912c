"""virtio-console: queue 0 carries input, queue 1 output. Source: virtio 1.2, section 5.3.

    host end ──▶ in_buffer ──▶ receiveq buffers            transmitq ──▶ host end's backlog ──▶ host
                    │ full: the host end is not read          │ full: the queue is not served

A chain of the transmitq is given back before its bytes go out. Were it the other way round, a death in between would
make the next worker print them twice; now it costs what sat in the backlog.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from console_worker.device import RingDevice
from shared.chardev import CharDev
from shared.reactor import Reactor
from shared.vhost_user import VIRTIO_F_VERSION_1
from shared.vring import SplitRing

VIRTIO_CONSOLE_F_SIZE = 1 << 0
RECEIVEQ, TRANSMITQ = 0, 1
IN_BUFFER_LIMIT = 64 << 10
CHUNK_LIMIT = 64 << 10  # of one chain; Linux sends at most a page
_CONFIG = Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr


class Console(RingDevice):
    num_queues = 2
    features = VIRTIO_F_VERSION_1 | VIRTIO_CONSOLE_F_SIZE

    def __init__(self, reactor: Reactor, name: str, host: CharDev) -> None:
        super().__init__(reactor, name)
        self._host = host
        self._in_buffer = bytearray()
        self.bytes_in = 0
        self.bytes_out = 0
        self._size = host.size()
        host.on_input = self._input
        host.on_drain = self._drained

    # Configuration ----------------------------------------------------------------------------------------------

    def get_config(self, offset: int, size: int) -> bytes:
        return _CONFIG.pack(*self._size, 1, 0)[offset : offset + size]

    def resized(self) -> None:
        """The host's terminal may have another size now."""
        size = self._host.size()
        if size != self._size:
            self._size = size
            if self.server is not None:
                self.server.config_changed()

    # Rings ------------------------------------------------------------------------------------------------------

    def serve(self, index: int, ring: SplitRing) -> int:
        return self._receive(ring) if index == RECEIVEQ else self._transmit(ring)

    def _input(self, data: bytes) -> None:
        self._in_buffer += data
        self.bytes_in += len(data)
        self._host.pause_input(len(self._in_buffer) >= IN_BUFFER_LIMIT)
        self.process(RECEIVEQ)

    def _receive(self, ring: SplitRing) -> int:
        done = 0
        while self._in_buffer and done < ring.size and (chain := ring.pop()) is not None:
            written = ring.write(chain, bytes(self._in_buffer[: chain.capacity]))
            ring.push(chain, written)
            del self._in_buffer[:written]
            done += 1
        if done:
            self._host.pause_input(len(self._in_buffer) >= IN_BUFFER_LIMIT)
        return done

    def _transmit(self, ring: SplitRing) -> int:
        done = 0
        while done < ring.size and not self._host.full and (chain := ring.pop()) is not None:
            data = ring.read(chain, CHUNK_LIMIT)
            ring.push(chain, 0)
            self._host.write(data)
            self.bytes_out += len(data)
            done += 1
        return done

    def _drained(self) -> None:
        self.process(TRANSMITQ)

    # Pause and move ---------------------------------------------------------------------------------------------

    def hold(self) -> None:
        self._host.hold()

    def release(self) -> None:
        self._host.release()
        self.process(RECEIVEQ)

    def save(self) -> dict[str, Any]:
        """`in_buffer`: typed and not yet read by the guest; `out_buffer`: printed and not yet taken by the host."""
        return {"in_buffer": list(self._in_buffer), "out_buffer": list(self._host.backlog)}

    def load(self, state: dict[str, Any]) -> None:
        """Raises KeyError, ValueError and TypeError for what save() did not make."""
        typed, printed = state["in_buffer"], state.get("out_buffer", [])
        if not isinstance(typed, list) or not isinstance(printed, list):
            raise TypeError("a console's buffers are lists of bytes")  # bytes() of a number is so many zeros
        typed, printed = bytes(typed), bytes(printed)
        self._in_buffer[:] = typed
        self._host.write(printed)
