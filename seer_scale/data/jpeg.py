"""What a JPEG says of itself before it is decoded (ITU T.81, Annex B), and which of a decoder's complaints mean damage.

Markers are found as libjpeg finds them, so that what is asked of the decoder rests on the frame it will see.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""SOF markers: 3 of the others are lossless, 9 to 11 arithmetic, the rest hierarchical."""
ALONE = frozenset((0x01, *range(0xD0, 0xD8)))
"""Markers without a segment: TEM, RST."""
EOI, SOS, APP0, APP1, APP14 = 0xD9, 0xDA, 0xE0, 0xE1, 0xEE

XMP_PREFIX = re.compile(rb"""xmlns:([\w.-]{1,40})\s*=\s*["']http://ns\.adobe\.com/tiff/1\.0/["']""")
XMP_ORIENTATION = rb"""\b%s:Orientation(?:\s*=\s*["']|(?:\s[^<>]{0,200})?>)\s*([0-9])"""
"""An attribute, or an element with whatever attributes of its own."""
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker")
DAMAGED = re.compile(r"Corrupt JPEG data|Premature end of JPEG|Bogus|Inconsistent progression")
HARMLESS = re.compile(r"unknown JFIF revision|Unknown Adobe color transform|Invalid SOS parameters")


class Header(NamedTuple):
    process: int
    """The frame's marker, 0xC0 to 0xCF."""
    precision: int
    height: int
    width: int
    sampling: tuple[tuple[int, int], ...]
    """(horizontal, vertical) sampling factor of each component."""
    orientation: int
    """Exif's, else XMP's; 1 where neither tells."""
    first_scan: int
    """Where the segment of its first scan begins."""
    junk: int
    """Bytes between its segments that belong to none."""

    @property
    def can_be_reduced(self) -> bool:
        """Whether libjpeg-turbo promises to decode it smaller, and 8 bits a value."""
        return self.process in (BASELINE, EXTENDED, PROGRESSIVE) and self.precision == 8

    def coefficients(self, data: bytes) -> float:
        """Coefficients a pixel that its decoder keeps: those of the whole image where a scan brings only some of them."""
        if self.process in (BASELINE, EXTENDED) and data[self.first_scan + 4 : self.first_scan + 5] == bytes([len(self.sampling)]):
            return 0.0
        across, down = zip(*self.sampling)
        return sum(h * v for h, v in self.sampling) / (max(across) * max(down))


def read_header(data: bytes) -> Header | None:
    """None where no frame comes before a first scan."""
    at, junk, frame, exif, xmp = 2, 0, None, None, None
    while (begin := data.find(b"\xff", at)) >= 0 and begin + 4 <= len(data):
        junk, at, marker = junk + begin - at, begin, data[begin + 1]
        if marker == 0xFF:  # fill
            at += 1
        elif marker in ALONE:
            at += 2
        elif not marker:
            at, junk = at + 2, junk + 2
        elif marker == SOS:
            if frame is None:
                return None
            orientation = exif or xmp or 1
            return Header(*frame, orientation, at, junk)
        elif marker == EOI:
            return None
        else:
            if marker in FRAMES and frame is None:
                frame = _frame(data, at)
            elif marker == APP1 and data[at + 4 : at + 10] == b"Exif\0\0":
                exif = exif or _exif_orientation(data, at + 10)
            elif marker == APP1 and data[at + 4 : at + 33] == b"http://ns.adobe.com/xap/1.0/\0":
                xmp = xmp_orientation(data[at + 33 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]) or xmp
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _frame(data: bytes, at: int) -> tuple[int, int, int, int, tuple[tuple[int, int], ...]] | None:
    precision, height, width, components = struct.unpack_from(">BHHB", data.ljust(at + 10, b"\0"), at + 4)
    factors = data[at + 11 : at + 10 + 3 * components : 3]
    if not all(f >> 4 and f & 15 for f in factors) or len(factors) != components or not components:
        return None
    return data[at + 1], precision, height, width, tuple((f >> 4, f & 15) for f in factors)


def xmp_orientation(packet: bytes) -> int | None:
    """By the prefix that the packet gives TIFF's namespace; None where it says nothing."""
    prefix = XMP_PREFIX.search(packet)
    found = re.search(XMP_ORIENTATION % (re.escape(prefix[1]) if prefix else b"tiff"), packet)
    return int(found[1]) if found else None


def _exif_orientation(data: bytes, tiff: int) -> int | None:
    """Of the TIFF directory at `tiff` (Exif 2.3, 4.6.2); None where there is none, or it is damaged."""
    while data[tiff : tiff + 6] == b"Exif\0\0":  # some write the name twice
        tiff += 6
    order = {b"II": "<", b"MM": ">"}.get(data[tiff : tiff + 2])
    try:
        directory = tiff + struct.unpack_from(f"{order}I", data, tiff + 4)[0]
        for n in range(struct.unpack_from(f"{order}H", data, directory)[0]):
            tag, kind = struct.unpack_from(f"{order}HH", data, directory + 2 + 12 * n)
            if tag == 0x0112:
                form = {1: "B", 3: "H", 4: "I"}.get(kind)  # it should be 3, SHORT
                return struct.unpack_from(f"{order}{form}", data, directory + 10 + 12 * n)[0] if form else None
    except struct.error:
        pass
    return None


def scans(data: bytes, header: Header, most: int) -> int:
    """How many scans it has, counted no further than one beyond `most`."""
    if data.count(b"\xff\xda", header.first_scan) <= most:
        return most  # not more, whatever of them are scans: not worth a walk
    at, found = header.first_scan, 0
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data) and found <= most:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif not marker or marker in ALONE:
            at += 2
        elif marker == EOI:
            break
        else:
            found += marker == SOS
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return found


def repaired(complaint: str, data: bytes, header: Header) -> Iterator[bytes]:
    """The file without the oddity that a decoder's first complaint is about, if it is one that costs no pixel: what the
    decoder says of these bytes is what it says of the image. Nothing for any other complaint.

    Where the last scan is padded, as cameras do with what they have written whole, how much of the run before the end
    belongs to the scan is not told: up to two bytes of it are tried.
    """
    if extraneous := not header.junk and EXTRANEOUS.search(complaint):
        end = data.find(b"\xff\xd9", header.first_scan)
        begin = len(data[:end].rstrip(data[end - 1 : end])) if end > 0 else 0
        if 0 < int(extraneous[1]) <= end - begin:
            yield from (data[:begin] + data[begin : begin + kept] + data[end:] for kept in range(3))
    elif header.junk or HARMLESS.search(complaint):
        yield _as_written_by_the_book(data, header)


def _as_written_by_the_book(data: bytes, header: Header) -> bytes:
    """Without bytes between its segments, of JFIF's revision 1, with a colour transform that Adobe knows (the one libjpeg
    takes for an unknown one), and the only selection of coefficients that its first scan can have."""
    at, out = 2, bytearray(data[:2])
    while at < header.first_scan:
        begin = data.find(b"\xff", at)
        marker = data[begin + 1]
        if marker == 0xFF or not marker or marker in ALONE:
            at = begin + (1 if marker == 0xFF else 2)
            continue
        size = 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")
        piece = bytearray(data[begin : begin + size])
        if marker == APP0 and piece[4:9] == b"JFIF\0":
            piece[9] = 1
        elif marker == APP14 and piece[4:9] == b"Adobe" and piece[15] > 2:
            piece[15] = 2 if len(header.sampling) == 4 else 1
        if marker == SOS:
            break
        out, at = out + piece, begin + size
    scan = bytearray(data[header.first_scan :])
    if header.process in (BASELINE, EXTENDED):
        last = 5 + 2 * scan[4]
        scan[last : last + 3] = b"\x00\x3f\x00"
    return bytes(out + scan)


def is_damage(complaint: str) -> bool:
    """Whether what libjpeg-turbo complains of are pixels that are not the image's."""
    return bool(DAMAGED.search(complaint) or EXTRANEOUS.search(complaint))
