"""Every exception that Flotilla raises on purpose.

    FlotillaError                 anything that a user may see: a message and, where there is one, a hint
    ├── ConfigError               a flag, file or JSON field is wrong                     HTTP 400
    │   └── DuplicateIdError      the same device id or path twice                        HTTP 409
    ├── NotFoundError             no VM, no such device, no such path of the API          HTTP 404
    ├── StateError                the VM's state forbids the request                      HTTP 500
    ├── HostError                 this host lacks something or refused a system call      HTTP 500
    │   └── KvmError              /dev/kvm is missing, unusable or refused an ioctl
    ├── GuestError                the guest did something that can't be carried out
    │   └── BadGuestAddress       an address range that is not guest RAM
    ├── WorkerError               a worker process failed, died or answered with an error
    │   └── WorkerLost            it died before it answered
    ├── ProtocolError             a peer (control plane, vhost-user, migration) broke its protocol
    ├── MigrationError            a migration failed; the guest's fate is in the message
    │   ├── MigrationCancelled    somebody asked for it
    │   ├── MigrationInDoubt      the destination was told to go on and has not answered
    │   ├── PeerRefused           the other side said no; the message is its reason
    │   └── GuestLost             its only owner died: the guest runs nowhere
    └── Timeout                   a deadline passed; the message says what was waited for

A cause is chained (`raise … from cause`), so that `chain()` can print Cloud Hypervisor's numbered list.
"""

from __future__ import annotations


class FlotillaError(Exception):
    """Base of the tree. `hint` tells the user what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(FlotillaError):
    pass


class DuplicateIdError(ConfigError):
    pass


class NotFoundError(FlotillaError):
    pass


class StateError(FlotillaError):
    pass


class HostError(FlotillaError):
    pass


class KvmError(HostError):
    pass


class GuestError(FlotillaError):
    pass


class BadGuestAddress(GuestError):
    pass


class WorkerError(FlotillaError):
    pass


class WorkerLost(WorkerError):
    pass


class ProtocolError(FlotillaError):
    pass


class MigrationError(FlotillaError):
    pass


class MigrationCancelled(MigrationError):
    pass


class MigrationInDoubt(MigrationError):
    pass


class PeerRefused(MigrationError):
    pass


class GuestLost(MigrationError):
    pass


class Timeout(FlotillaError):
    pass


def chain(error: BaseException) -> list[str]:
    """The messages of an error and its causes, outermost first, as Cloud Hypervisor's error arrays have them."""
    messages: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        messages.append(str(seen) or type(seen).__name__)
        seen = seen.__cause__
    return messages
