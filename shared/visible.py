"""Text of others (a worker, a migration's peer, a guest) as a log and a terminal may show it."""

from __future__ import annotations


def visible(text: str, most: int = 0) -> str:
    """One line of printable letters: others as Python escapes them (`\\n`, `\\x1b`, `\\u202e`). What is behind `most`
    letters is cut off, unless that is 0."""
    if text.isprintable() and (not most or len(text) <= most):
        return text
    head = text[:most] if most else text
    shown = "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in head])
    if most and (len(text) > most or len(shown) > most):
        return shown[:most] + "…"
    return shown
