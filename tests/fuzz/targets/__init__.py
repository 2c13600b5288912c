"""Every Python target, by name."""

from __future__ import annotations

from tests.fuzz.targets import files, guests, peers, vhost, words

TARGETS = {target.name: target for module in (peers, vhost, words, guests, files) for target in module.TARGETS}
