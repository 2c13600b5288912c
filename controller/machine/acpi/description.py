"""What of the VM's configuration shows in its firmware tables."""

from __future__ import annotations

from controller.machine.topology import Topology
from shared.records import NamedTuple


class SmbiosStrings(NamedTuple):
    """The `--platform` strings; None takes Cloud Hypervisor's default or leaves the field out. `uuid` as text."""

    manufacturer: str | None = None
    product_name: str | None = None
    version: str | None = None
    serial_number: str | None = None
    uuid: str | None = None
    sku_number: str | None = None
    family: str | None = None
    chassis_asset_tag: str | None = None
    oem_strings: tuple[str, ...] = ()


class Description(NamedTuple):
    """vCPU counts, `--cpus topology=` if given, whether COM1 exists, and the SMBIOS strings."""

    boot_vcpus: int
    max_vcpus: int
    topology: Topology | None = None
    serial: bool = True
    smbios: SmbiosStrings = SmbiosStrings()
