"""The code of all modules that a program starts with, in one file: to find, open and unmarshal a .pyc file for each is
a fifth of their import (docs/adr/0005-boot-imports.md).

    refresh(path, program, …)   deploy/setup.sh: import the programs, write what that brought in
    use(path)                   a launcher, first of all

A module is taken from the bundle only while its source has the modification time and size that it had when the bundle
was built, the rule of .pyc files; otherwise, and for every module that is not in it, the ordinary import goes on. So a
bundle that is missing, old or of another Python costs time and nothing else. Like a .pyc file it is code: whoever
may write it may run programs as the user.
"""

from __future__ import annotations

import marshal
import os
import sys

from shared.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec, SourceFileLoader
    from types import CodeType
else:  # importlib itself would be 0.6 ms of what is to be saved
    ModuleSpec, SourceFileLoader = type(__spec__), type(__loader__)

# What another interpreter writes is never read: marshal has no version that could be trusted across releases.
HEADER = f"flotilla bundle {sys.version}\n".encode()
# name -> (source, its st_mtime_ns, its st_size, is it a package, code)
Entries = dict[str, tuple[str, int, int, bool, "CodeType"]]


class _Loader(SourceFileLoader):
    """The ordinary loader, but for where it has the code from."""

    def __init__(self, name: str, path: str, code: CodeType) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        return self._code


class _Finder:
    def __init__(self, entries: Entries) -> None:
        self._entries = entries

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        entry = self._entries.pop(name, None)  # each is needed once
        if entry is None:
            return None
        source, mtime, size, is_package, code = entry
        if not _unchanged(source, mtime, size):
            return None
        spec = ModuleSpec(name, _Loader(name, source, code), origin=source, is_package=is_package)
        spec.has_location = True
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(os.path.dirname(source))
        return spec


def _unchanged(source: str, mtime: int, size: int) -> bool:
    try:
        now = os.stat(source)
    except OSError:
        return False
    return (now.st_mtime_ns, now.st_size) == (mtime, size)


def _read(path: str) -> Entries:
    """Nothing, if the file can't be used."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
        if data.startswith(HEADER):
            entries: Entries = marshal.loads(memoryview(data)[len(HEADER) :])
            return entries
    except (OSError, EOFError, ValueError, TypeError):
        pass
    return {}


def use(path: str) -> None:
    """Import from this bundle what it has."""
    # After the built-in and frozen modules, before the search through sys.path.
    sys.meta_path.insert(2, _Finder(_read(path)))


def refresh(path: str, *programs: str) -> bool:
    """Import the programs in this interpreter, a fresh one, and write what came with them; False: nothing changed."""
    present = _read(path)
    if present and all(_unchanged(source, mtime, size) for source, mtime, size, _, _ in present.values()):
        return False
    before = set(sys.modules)
    for program in programs:
        __import__(program)
    entries: Entries = {}
    for name in sorted(sys.modules.keys() - before):
        spec: Any = getattr(sys.modules[name], "__spec__", None)
        if spec is None or spec.name != name or not isinstance(spec.loader, SourceFileLoader):
            continue
        code = spec.loader.get_code(name)
        if code is None:
            continue
        status = os.stat(spec.origin)
        package = spec.submodule_search_locations is not None
        entries[name] = (spec.origin, status.st_mtime_ns, status.st_size, package, code)
    fresh = f"{path}.{os.getpid()}.new"
    with open(fresh, "wb") as file:
        file.write(HEADER + marshal.dumps(entries))
    os.replace(fresh, path)
    return True
