"""From an API request to an answer: method and body rules, the status table, the error array.

    200 + JSON     GET, and vmm.shutdown with an empty body
                   vm.add-net too, and 204 from it where there is nothing to tell
    204            everything else that went well
    400 404 409 …  `["Error from API", "what failed", "why", …]`, outermost first, status by the error's class
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from controller.api.endpoints import BY_NAME
from shared import log
from shared.errors import ConfigError, DuplicateIdError, FlotillaError, NotFoundError, chain
from shared.linux import close_fds
from shared.typed import Any

Verb = Callable[[Any], Awaitable[Any]]

# The first class that fits decides; everything else is 500.
STATUS: tuple[tuple[type[FlotillaError], int], ...] = (
    (DuplicateIdError, 409),
    (ConfigError, 400),
    (NotFoundError, 404),
)


def status_of(error: BaseException) -> int:
    """HTTP status of an error. A wrapped configuration error is still the requester's mistake."""
    below: BaseException | None = error
    while below is not None:
        for kind, status in STATUS:
            if isinstance(below, kind):
                return status
        below = below.__cause__
    return 500


def failure(error: BaseException) -> dict[str, Any]:
    body = json.dumps(["Error from API", *chain(error)], separators=(",", ":"), ensure_ascii=False)
    return {"status": status_of(error), "body": body.encode(errors="replace")}


async def _no_descriptors() -> list[int]:
    return []


async def answer(
    verbs: dict[str, Verb],
    method: str,
    name: str,
    body: bytes,
    fetch: Callable[[], Awaitable[list[int]]] = _no_descriptors,
) -> dict[str, Any]:
    """{"status", "body"} for one request. Never raises for what a client or the VM did wrong.

    `fetch` gives the descriptors that came with it. They become `fds` of the body, and the verb's unless it raises.
    """
    fds: list[int] = []
    try:
        endpoint = BY_NAME.get(name)
        verb = verbs.get(name)
        if endpoint is None or verb is None:
            raise NotFoundError(f"{name}: no such request")
        if method != endpoint.method:
            raise ConfigError(f"{name}: method {method} is not supported", f"use {endpoint.method}")
        argument = _parse(name, body, endpoint.body)
        if endpoint.fds and isinstance(argument, dict):
            if argument.get("fds"):
                raise ConfigError(f"{name}: fds in the body", "send the descriptors with the request (SCM_RIGHTS)")
            argument["fds"] = fds = await fetch()
        result = await verb(argument)
    except (FlotillaError, OSError) as error:
        close_fds(fds)
        reason = error if isinstance(error, FlotillaError) else FlotillaError(str(error))
        log.error(f"API request {name} failed: {', '.join(chain(reason))}")
        return failure(reason)
    if endpoint.success == 204:
        return {"status": 204, "body": b""}
    if result is None:
        return {"status": endpoint.quiet, "body": b""}
    return {"status": 200, "body": json.dumps(result, separators=(",", ":"), ensure_ascii=False).encode()}


def _parse(name: str, body: bytes, wanted: bool) -> Any:
    if not wanted:
        if body:
            raise ConfigError(f"{name}: takes no request body")
        return None
    if not body:
        raise ConfigError(f"{name}: a JSON request body is missing")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: the request body is not JSON: {error}") from None
