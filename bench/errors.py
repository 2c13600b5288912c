"""What keeps a figure from being measured."""

from __future__ import annotations

from shared.errors import FlotillaError


class BenchError(FlotillaError):
    """A sample could not be taken; the message is what the report gives as the reason."""
