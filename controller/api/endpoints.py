"""The API's paths: one table for the HTTP process, the controller and the tests.

Names, methods and success codes are Cloud Hypervisor's (its API page, section 3.3); the last six are ours.
"""

from __future__ import annotations

from shared.records import Record

ROOT = "/api/v1/"


class Endpoint(Record):
    """`body`: whether the request has one. `success`: the status of a good answer; `quiet`: of one without content.
    `fds`: whether descriptors that come with it belong to it (SCM_RIGHTS); others are closed."""

    name: str
    method: str
    body: bool
    success: int
    summary: str
    quiet: int = 200
    fds: bool = False


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("vmm.ping", "GET", False, 200, "Is the VMM there, and which one is it?"),
    Endpoint("vmm.shutdown", "PUT", False, 200, "End the VM, if there is one, and the VMM"),
    Endpoint("vm.info", "GET", False, 200, "Configuration, state and device tree"),
    Endpoint("vm.counters", "GET", False, 200, "Counters of every device"),
    Endpoint("vm.create", "PUT", True, 204, "Give the VMM a VM's configuration"),
    Endpoint("vm.boot", "PUT", False, 204, "Boot the VM that was created"),
    Endpoint("vm.pause", "PUT", False, 204, "Stop the guest where it is"),
    Endpoint("vm.resume", "PUT", False, 204, "Let a paused guest go on"),
    Endpoint("vm.shutdown", "PUT", False, 204, "End the guest; its configuration stays"),
    Endpoint("vm.reboot", "PUT", False, 204, "End the guest and boot it again"),
    Endpoint("vm.delete", "PUT", False, 204, "End the guest and forget its configuration"),
    Endpoint("vm.add-net", "PUT", True, 200, "Add a network device; where it is, if the VM runs", quiet=204, fds=True),
    Endpoint("vm.power-button", "PUT", False, 204, "Press the ACPI power button"),
    Endpoint("vm.send-migration", "PUT", True, 204, "Migrate the VM away; answers when it is done"),
    Endpoint("vm.receive-migration", "PUT", True, 204, "Receive a VM; answers when it runs here"),
    Endpoint("vm.migration-progress", "GET", False, 200, "Phase and figures of the migration"),
    Endpoint("vm.cancel-migration", "PUT", False, 204, "Give the migration up; the guest stays at the source"),
    Endpoint("vm.migration-estimate", "GET", False, 200, "How a remote migration would go: takes a second"),
    Endpoint("vm.migration-resolve", "PUT", True, 204, "Whose is the guest of a migration in doubt?"),
    Endpoint("vmm.fleet", "GET", False, 200, "Every process of the VM"),
)
BY_NAME = {endpoint.name: endpoint for endpoint in ENDPOINTS}
