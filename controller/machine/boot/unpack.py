"""Decompress a kernel's payload piece by piece. The libraries are imported only when such a kernel is booted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from shared.errors import HostError

# A legacy lz4 block holds at most 8 MiB of plain data.
LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
LZ4_BLOCK_SIZE = 8 << 20
CHUNK_SIZE = 4 << 20
SLICE_SIZE = 256 << 10
# The dictionary's size stands in the payload. Linux is packed with 32 to 128 MiB.
XZ_MEMORY_LIMIT = 256 << 20
# Linux's build appends the size of the plain data to whatever the compressor wrote.
TRAILER_SIZE = 4
# No kernel is larger; a payload that claims to be is damaged or hostile.
MAX_PLAIN_SIZE = 1 << 30


class Unsupported(HostError):
    """The payload's compression is unknown here; the kernel's own decompressor can still run in the guest."""


def chunks(data: memoryview, name: str) -> Iterator[bytes]:
    """The plain payload in consecutive pieces of a few MiB, without its trailer.

    Raises Unsupported at once for another format; the iterator raises HostError for damaged data.
    """
    for magic, unpack in _FORMATS:
        if data[: len(magic)] == magic:
            return _bounded(unpack(data, name), name)
    raise Unsupported(f"{name}: the payload's compression is unknown (it begins with {bytes(data[:4]).hex(' ')})")


def _bounded(pieces: Iterator[bytes], name: str) -> Iterator[bytes]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_PLAIN_SIZE:
            raise HostError(f"{name}: the payload unpacks to more than {MAX_PLAIN_SIZE} bytes: the file is damaged")
        yield piece


def _lz4(data: memoryview, name: str) -> Iterator[bytes]:
    try:
        import lz4.block
    except ImportError as error:
        raise Unsupported(f"{name}: the payload is lz4, and the Python package lz4 is missing") from error
    return _lz4_blocks(data, name, lz4.block.decompress, lz4.block.LZ4BlockError)


def _lz4_blocks(
    data: memoryview, name: str, decompress: Callable[..., bytes], failure: type[Exception]
) -> Iterator[bytes]:
    position, end = len(LZ4_LEGACY_MAGIC), len(data) - TRAILER_SIZE
    while position < end:
        if data[position : position + 4] == LZ4_LEGACY_MAGIC:  # streams may be concatenated
            position += 4
            continue
        size = int.from_bytes(data[position : position + 4], "little")
        position += 4
        if size > end - position:
            raise HostError(f"{name}: an lz4 block of {size} bytes where {max(end - position, 0)} are left")
        try:
            yield decompress(data[position : position + size], uncompressed_size=LZ4_BLOCK_SIZE)
        except failure as error:
            raise HostError(f"{name}: the lz4 payload is damaged") from error
        position += size


def _gzip(data: memoryview, name: str) -> Iterator[bytes]:
    import zlib

    stream = zlib.decompressobj(wbits=31)
    try:
        for start in range(0, len(data), SLICE_SIZE):
            rest: bytes | memoryview = data[start : start + SLICE_SIZE]
            while True:
                piece = stream.decompress(rest, CHUNK_SIZE)
                yield piece
                rest = stream.unconsumed_tail
                if not rest and len(piece) < CHUNK_SIZE:
                    break
            if stream.eof:
                return
    except zlib.error as error:
        raise HostError(f"{name}: the gzip payload is damaged") from error
    raise HostError(f"{name}: the gzip payload is cut short")


def _xz(data: memoryview, name: str) -> Iterator[bytes]:
    import lzma

    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_LIMIT)
    rest: bytes | memoryview = data
    try:
        while not stream.eof:
            piece = stream.decompress(rest, CHUNK_SIZE)
            rest = b""
            if not piece and stream.needs_input:
                raise HostError(f"{name}: the xz payload is cut short")
            yield piece
    except lzma.LZMAError as error:
        raise HostError(f"{name}: the xz payload is damaged") from error


_FORMATS: tuple[tuple[bytes, Callable[[memoryview, str], Iterator[bytes]]], ...] = (
    (LZ4_LEGACY_MAGIC, _lz4),
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\x00", _xz),
)
