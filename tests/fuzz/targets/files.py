"""What is booted: kernels in every form, initramfs archives, packed payloads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from controller.machine.boot import load
from controller.machine.layout import compute
from shared.memory import GuestMemory
from tests.controller.machine import images
from tests.fuzz.choices import Choices
from tests.fuzz.engine import Target

RAM = 16 << 20
PACKERS = (images.pack_lz4, images.pack_gzip, images.pack_xz)
GUARD = (0xA_0000, 0x5_F000)  # where the firmware's tables go


def _images() -> list[bytes]:
    small = images.elf(((0x20_0000, images.CODE[:300], 300),), sections={".text": b"x", ".initrd": b"initramfs"})
    return [
        small,
        images.elf(((0x20_0000, images.CODE[:300], 300),), sections={".initrd": b"i"}, bits=32),
        *(images.bzimage(pack(small), preferred=0x10_0000) for pack in PACKERS),
        images.bzimage(b"unknown", preferred=0x10_0000),
        images.uki({".linux": small, ".initrd": b"initramfs", ".cmdline": b"quiet"}),
    ]


def kernels() -> Iterator[Callable[[bytes], None]]:
    memory, layout, valid = GuestMemory.create(RAM), compute(RAM, 46), _images()
    guard = memory.read(*GUARD)

    def run(data: bytes) -> None:
        choices = Choices(data)
        image = bytearray(choices.one_of(valid))
        for _ in range(choices.below(6)):
            at = choices.below(min(len(image), 1400)) if image else 0
            size = choices.one_of((1, 2, 4, 8))
            image[at : at + size] = choices.number(8 * size).to_bytes(size, "little")
        if not choices.below(6):
            del image[choices.below(4000) :]
        fds = [os.memfd_create("kernel"), os.memfd_create("initramfs")]
        os.write(fds[0], image)
        os.write(fds[1], choices.rest())
        try:
            load(memory, layout, f"/proc/self/fd/{fds[0]}", f"/proc/self/fd/{fds[1]}", "quiet")
        finally:
            for fd in fds:
                os.close(fd)
            assert memory.read(*GUARD) == guard, "the firmware's memory was written to"

    try:
        yield run
    finally:
        memory.close()


TARGETS = (Target("kernels", kernels, about="kernel images: ELF, bzImage with each packer, unified kernel image"),)
