"""The tar reader agrees with tarfile on sound archives and refuses what tarfile overlooks."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from data.manifest import DataError
from data.tar import read_members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def make_archive(format: int) -> bytes:
    generator = random.Random(0)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for number in range(12):
            long = "e" * 40 + "/" if format == tarfile.USTAR_FORMAT else "é" * 60
            header = tarfile.TarInfo(f"folder/{long * (number % 3)}{'x' * (number * 20 % 90)}-{number}.txt")
            header.size = generator.choice([0, 1, 511, 512, 513, 3000])
            archive.addfile(header, io.BytesIO(generator.randbytes(header.size)))
        link = tarfile.TarInfo("folder/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "0.txt"
        archive.addfile(link)
    return stream.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_same_members_as_tarfile(format: int) -> None:
    """Catches long names that are lost, payloads read at a wrong place, links taken for files."""
    raw = make_archive(format)
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        wanted = [
            (member.name, archive.extractfile(member).read())  # type: ignore[union-attr]
            for member in archive
            if member.isreg()
        ]
    assert len(wanted) == 12
    assert list(read_members(io.BytesIO(raw), "a.tar", (".txt",))) == wanted
    assert list(read_members(io.BytesIO(raw), "a.tar", ("-3.txt",))) == [wanted[3]]


@pytest.mark.parametrize("format", FORMATS)
def test_every_truncation_is_an_error(format: int) -> None:
    """Catches the end of the data at a header, which tarfile takes for the end of the archive."""
    raw = make_archive(format)
    end = len(raw.rstrip(b"\0")) + 511 & ~511
    while raw[end : end + 1024].count(0) != 1024:
        end += 512
    for length in range(0, end, 256):
        with pytest.raises(DataError, match=r"a\.tar: damaged tar file: (truncated|a name)"):
            list(read_members(io.BytesIO(raw[:length]), "a.tar", (".txt",)))


def test_damaged_header_is_an_error() -> None:
    """Catches a flipped bit in a later header, at which tarfile stops without a word."""
    raw = bytearray(make_archive(tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        offset = archive.getmembers()[5].offset
    raw[offset + 3] ^= 1
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        assert len(archive.getmembers()) == 5
    with pytest.raises(DataError, match=r"a\.tar: not a tar file, or a damaged one: bad checksum"):
        list(read_members(io.BytesIO(raw), "a.tar", (".txt",)))
