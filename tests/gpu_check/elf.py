"""What a program needs of the system it is started on, read from the file itself: no binutils on the other machine."""

from __future__ import annotations

import re
import struct

_DYNAMIC = 6  # section type: entries of the dynamic linker
_VERSIONS_NEEDED = 0x6FFFFFFE
_NEEDED = 1  # tag of a dynamic entry that names a library


def needs(data: bytes) -> dict:
    """Names of the libraries that are loaded with a program, and the newest version it wants of each symbol set."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("this is no 64-bit little-endian ELF file")
    sections = list(_sections(data))
    libraries, versions = [], []
    for kind, offset, size, link in sections:
        if kind not in (_DYNAMIC, _VERSIONS_NEEDED):
            continue
        strings = sections[link][1]
        if kind == _DYNAMIC:
            entries = struct.iter_unpack("<qQ", data[offset : offset + size])
            libraries += [_text(data, strings + value) for tag, value in entries if tag == _NEEDED]
        else:
            versions += _needed_versions(data, offset, strings)
    return {"libraries": libraries, **{name.lower(): newest(name, versions) for name in ("GLIBC", "GLIBCXX")}}


def newest(name: str, versions: list[str]) -> str | None:
    """`2.34` of `GLIBC_2.3`, `GLIBC_2.34`; `None` where no such symbol is needed."""
    found = [match[1] for version in versions if (match := re.fullmatch(rf"{name}_([0-9.]+)", version))]
    return max(found, key=order, default=None)


def order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _sections(data: bytes):
    """Type, offset, size and linked section of each."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    for at in range(count):
        _name, kind, _flags, _address, offset, length, link = struct.unpack_from("<IIQQQQI", data, table + at * size)
        yield kind, offset, length, link


def _needed_versions(data: bytes, at: int, strings: int) -> list[str]:
    found = []
    while True:
        _version, count, _file, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(count):
            _hash, _flags, _other, name, further = struct.unpack_from("<IHHII", data, entry)
            found.append(_text(data, strings + name))
            entry += further
        if following == 0:
            return found
        at += following


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
