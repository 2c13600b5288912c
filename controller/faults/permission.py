"""`vmm.fault-inject` and the flag that allows it. On the boot path: everything else comes with the first request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from shared.errors import StateError
from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controller.vmm import Vmm

FLAG = "--allow-fault-injection"


def fault_inject(vmm: Vmm) -> Callable[[Any], Awaitable[Any]]:
    """The handler of the request. Raises FlotillaError, StateError without the flag; nothing has been done then."""

    def vcpus() -> dict[str, int]:
        rows = vmm.vm.describe() if vmm.vm is not None else []
        return {row["device"]: row["pid"] for row in rows if row["kind"] == "vcpu"}

    async def handler(body: Any) -> dict[str, Any]:
        if not vmm.options.allow_fault_injection:
            raise StateError("faults may not be injected into this VMM", f"start it with {FLAG}")
        from controller.faults.inject import Injector

        return await Injector(vmm.reactor, vmm.fleet, vmm.events, vcpus).request(body)

    return handler
