"""What a JPEG says of itself before it is decoded (ITU T.81, Annex B), and which of a decoder's complaints mean damage.

Markers are found as libjpeg finds them, so that what is asked of the decoder rests on the frame it will see.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

from seer_scale.errors import Unreadable

BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""SOF markers: 3 of the others are lossless, 9 to 11 arithmetic, the rest hierarchical."""
WITHOUT_SEGMENT = frozenset((0x01, *range(0xD0, 0xDA)))
"""Markers without a segment: TEM, RST, SOI, EOI."""
SOI, EOI, SOS, APP0, APP1, APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
RESTARTS = range(0xD0, 0xD8)
TABLES = (0xC4, 0xDB, 0xDD)
"""DHT, DQT, DRI."""

XMP_PREFIX = re.compile(rb"""xmlns:([\w.-]{1,40})\s*=\s*["']http://ns\.adobe\.com/tiff/1\.0/["']""")
XMP_ORIENTATION = rb"""\b%s:Orientation(?:\s*=\s*["']|(?:\s[^<>]{0,200})?>)\s*([0-9])"""
"""An attribute, or an element with whatever attributes of its own."""
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x(\w+)")
WARNING = re.compile(
    "Corrupt JPEG data|Premature end of JPEG|Bogus|Inconsistent progression"
    "|unknown JFIF revision|Unknown Adobe color transform|Invalid SOS parameters"
)
HOLE = re.compile(rb"(.)\1{31}", re.DOTALL)
TEXT = re.compile(rb"[\t\n\r\x20-\x7e\0]*")
"""What is no codes: any byte is as likely in these, so that of eight hardly one run in two thousand looks like it."""

Checksum = Callable[[bytes], tuple[int | None, str]]


class Header(NamedTuple):
    process: int
    """The frame's marker, 0xC0 to 0xCF."""
    precision: int
    height: int
    width: int
    sampling: tuple[tuple[int, int], ...]
    """(horizontal, vertical) sampling factor of each component."""
    orientation: int
    """Exif's, else XMP's; 1 where neither says."""
    first_scan: int
    """Where the segment of its first scan begins."""

    @property
    def can_be_reduced(self) -> bool:
        """Whether libjpeg-turbo promises to decode it smaller, and 8 bits a value."""
        return self.process in (BASELINE, EXTENDED, PROGRESSIVE) and self.precision == 8

    def coefficients(self, data: bytes) -> float:
        """Coefficients a pixel that its decoder keeps: those of the whole image where a scan brings only some of
        them."""
        if self.process in (BASELINE, EXTENDED) and data[self.first_scan + 4 : self.first_scan + 5] == bytes(
            [len(self.sampling)]
        ):
            return 0.0
        across, down = zip(*self.sampling)
        return sum(h * v for h, v in self.sampling) / (max(across) * max(down))


def _markers(data: bytes, at: int = 2) -> Iterator[tuple[int, int, int]]:
    """Each marker, where it begins and where its segment ends, as libjpeg finds them, whatever lies between them."""
    while (begin := data.find(b"\xff", at)) >= 0 and begin + 2 <= len(data):
        marker, at = data[begin + 1], begin + 2
        if marker == 0xFF:  # fill
            at = begin + 1
        elif marker:
            if marker not in WITHOUT_SEGMENT:
                at += int.from_bytes(data[at : at + 2], "big")
            yield marker, begin, at


def read_header(data: bytes) -> Header | None:
    """None where no frame comes before a first scan."""
    frame, exif, xmp = None, None, None
    for marker, at, end in _markers(data):
        if marker == SOS:
            return Header(*frame, exif or xmp or 1, at) if frame else None
        if marker == EOI:
            return None
        if marker in FRAMES and frame is None:
            frame = _frame(data, at)
        elif marker == APP1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = exif or _exif_orientation(data, at + 10)
        elif marker == APP1 and data[at + 4 : at + 33] == b"http://ns.adobe.com/xap/1.0/\0":
            xmp = xmp_orientation(data[at + 33 : end]) or xmp
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


def scans(data: bytes, header: Header, max_scans: int) -> int:
    """How many scans it has, counted no further than one beyond `max_scans`."""
    if data.count(b"\xff\xda", header.first_scan) <= max_scans:
        return max_scans  # not more, whatever of them are scans: not worth a walk
    found = 0
    for marker, _, _ in _markers(data, header.first_scan):
        found += marker == SOS
        if marker == EOI or found > max_scans:
            break
    return found


class Scan(NamedTuple):
    head: bytes
    """The segments before it that pixels need, and its own."""
    codes: bytes


def tidied(data: bytes, header: Header) -> list[Scan]:
    """Its scans, of which `joined` makes a file: without other segments, bytes between them, anything behind the end;
    of JFIF's revision 1, with a colour transform that Adobe knows (the one libjpeg takes for an unknown one), with the
    only selection of coefficients that a sequential scan can have, restarts numbered in order.

    What a decoder says of that is what it says of the image. Where the end mark is missing, a single scan is taken for
    whole; several are not given, for how many are missing is not known.
    """
    scans, head, codes, at, restarts = [], bytearray(), bytearray(), 0, 0
    for marker, begin, end in _markers(data):
        if at:  # in a scan
            codes += data[at:begin].rstrip(b"\xff")
            if marker in RESTARTS:
                codes += bytes((0xFF, RESTARTS[restarts % 8]))
                at, restarts = end, restarts + 1
                continue
            scans.append(Scan(bytes(head), bytes(codes)))
            head, codes, at, restarts = bytearray(), bytearray(), 0, 0
        if marker in (SOI, EOI):
            return scans
        segment = bytearray(data[begin:end])
        if marker == SOS:
            at = end
            if header.process != PROGRESSIVE:
                segment[-3:] = b"\x00\x3f\x00"
        elif marker == APP0 and segment[4:9] == b"JFIF\0" and len(segment) >= 16:
            segment[9] = 1
        elif marker == APP14 and segment[4:9] == b"Adobe" and len(segment) >= 16:
            segment[15] = segment[15] if segment[15] <= 2 else 2 if len(header.sampling) == 4 else 1
        elif marker not in TABLES and marker not in FRAMES:
            continue
        head += segment
    if header.coefficients(data) or not at:
        return []
    return [Scan(bytes(head), bytes(codes + data[at:].rstrip(b"\xff")))]


def joined(scans: list[Scan]) -> bytes:
    """Behind each scan stands an empty segment, by whose marker a decoder names the scan in its complaint."""
    names = (bytes((0xFF, _name(n), 0, 2)) for n in range(len(scans)))
    return b"\xff\xd8" + b"".join(scan.head + scan.codes + name for scan, name in zip(scans, names)) + b"\xff\xd9"


def _name(scan: int) -> int:
    return 0xE1 + scan % 13  # APP1 to APP13


def _excess(complaint: str, scans: list[Scan]) -> tuple[int, int]:
    """(scan, bytes) that libjpeg-turbo found behind the last code of one of `scans`, without up to eight that it had
    read ahead; (-1, 0) for any other complaint."""
    if found := EXTRANEOUS.search(complaint):
        for n, scan in enumerate(scans):
            if _name(n) == int(found[2], 16) and 0 < int(found[1]) < len(scan.codes):
                return n, int(found[1])
    return -1, 0


def is_warning(complaint: str) -> bool:
    """Whether libjpeg-turbo would have gone on, with pixels that may not be the image's; else it could not."""
    return bool(WARNING.search(complaint))


def without_oddities(scans: list[Scan], header: Header, complaint: str, checksum: Checksum, tries: int) -> bytes:
    """A JPEG of the same pixels of which the decoder does not warn, found by at most `tries` checksums.

    Raises Unreadable where a part is missing; `complaint` is the decoder's first.

    scans: as `tidied` gives them. checksum: of a file's pixels, or None and the decoder's first complaint.
    Bytes behind a scan's last code are cut off where they are padding, that is, all alike, or where they are text and
    the scan is seen to end as encoders end it. Else they are what was left of its codes when the decoder had lost its
    way.
    """
    scans, doubtful, left = list(scans), set(), iter(range(tries))

    def refuse() -> NoReturn:
        raise Unreadable(f"it is no whole image ({complaint})")

    def attempt(n: int, codes: bytes) -> tuple[int | None, str]:
        if next(left, None) is None:
            refuse()
        return checksum(joined([*scans[:n], Scan(scans[n].head, codes), *scans[n + 1 :]]))

    def cut(n: int, num: int) -> bytes:
        """Without its padding, of which up to two bytes may be codes; else without the `num` bytes that are none."""
        codes = scans[n].codes
        bare = len(codes.rstrip(codes[-1:]))
        for end in range(bare, min(bare + 3, len(codes) - num + 1)):
            known, what_is_left = attempt(n, codes[:end])
            if known is not None or _excess(what_is_left, scans)[0] not in (n, -1):
                return codes[:end]
        if HOLE.search(codes, max(0, bare - 1)) or not TEXT.fullmatch(codes, len(codes) - num):  # these may be codes
            refuse()
        doubtful.add(n)
        return codes[:-num]

    def ends_well(n: int) -> bool:
        """Whether scan n has no hole, and only ones behind its last code in its last byte (ITU T.81, F.1.2.3), as
        seldom where the decoder had lost its way."""
        codes = scans[n].codes
        if HOLE.search(codes):
            return False
        is_refining = header.process == PROGRESSIVE and scans[n].head[-3] > 0
        if is_refining and n < len(scans) - 1:  # its last code may be of bits without effect; others followed it whole
            return True
        known, _ = attempt(n, codes)
        while codes and attempt(n, codes[:-1])[0] is not None:  # the decoder had read ahead
            codes = codes[:-1]
        if not codes or codes.endswith(b"\xff\0"):
            return True
        last = codes[-1] | (codes[-1] + 1)  # its lowest zero is one
        return attempt(n, codes[:-1] + (b"\xff\0" if last == 0xFF else bytes([last])))[0] != known

    while scans:
        known, what_is_left = attempt(0, scans[0].codes)
        if known is not None and all(map(ends_well, doubtful)):
            return joined(scans)
        n, num = _excess(what_is_left, scans)
        if not num:
            complaint = what_is_left or complaint
            break
        scans[n] = Scan(scans[n].head, cut(n, num))
    refuse()
