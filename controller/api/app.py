"""The FastAPI application. Requests run side by side: one that waits for a peer holds up none of the others."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from controller.api.endpoints import ENDPOINTS, ROOT, Endpoint
from controller.config.version import FLOTILLA_VERSION

MAX_BODY = 4 << 20  # Cloud Hypervisor's limit of a payload
# (method, name, body, descriptors) -> (status, JSON)
Handler = Callable[[str, str, bytes, Sequence[int]], Awaitable[tuple[int, bytes]]]
HEADERS = {"server": "Cloud Hypervisor API"}


def build(handle: Handler) -> FastAPI:
    """The application; `handle` asks the controller."""
    title = "Cloud Hypervisor API"
    app = FastAPI(title=title, version=FLOTILLA_VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    for endpoint in ENDPOINTS:
        app.add_api_route(
            ROOT + endpoint.name,
            _route(endpoint, handle),
            # Any verb: a wrong one is answered with 400 as Cloud Hypervisor does, by the controller.
            methods=["GET", "PUT", "POST", "DELETE", "PATCH"],
            summary=endpoint.summary,
            operation_id=endpoint.name,
            response_class=Response,
        )
    app.add_exception_handler(HTTPException, _not_found)
    return app


def _route(endpoint: Endpoint, handle: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > MAX_BODY:
            return _answer(400, b'["Error from API","The request body is larger than 4 MiB"]')
        body = await request.body()
        if len(body) > MAX_BODY:
            return _answer(400, b'["Error from API","The request body is larger than 4 MiB"]')
        carrier = request.scope["descriptors"]
        if carrier.overflow:
            return _answer(400, b'["Error from API","Too many descriptors came with the request: 64 are the most"]')
        fds = carrier.take()
        try:
            status, content = await handle(request.method, endpoint.name, body, fds if endpoint.fds else ())
        finally:
            for fd in fds:
                os.close(fd)
        return _answer(status, content)

    return route


def _answer(status: int, content: bytes) -> Response:
    media_type = "application/json" if content else None
    return Response(content, status, HEADERS, media_type)


async def _not_found(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _answer(404 if status in (404, 405) else status, b'["Not Found"]')
