"""Damaged and hostile scans: mutated headers of real files, and files made to overflow, to loop and to blow up.

Each scan is opened and read in a process with a limit on its address space: `ROOM` more than it has after its imports. A process that
dies, or gives no answer within `SECONDS`, fails the test; so does any error but a SlideError of one line.
"""

import io
import logging
import random
import resource
import signal
import struct
import zlib
from collections import Counter
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from attack import Crash, in_child
from PIL import Image

from dreslcl.common import SlideError
from dreslcl.slide import Slide

SECONDS = 10
ROOM = 1 << 30  # bytes; 64 MB for the tiles read here, the rest for what a scan may rightly hold (a segment of 256 MB)


def read(path: Path) -> str:
    """Open a scan and read nine tiles of it at two resolutions: "read", or what is wrong with it."""
    try:
        with Slide.open(path, mpp=0.5) as slide:
            xy = np.stack(np.meshgrid(*(np.linspace(0, side - 1, 3).astype(np.int64) for side in slide.size)), axis=-1).reshape(-1, 2)
            slide.read_tiles(xy, 64, 0.5)
            slide.read_tiles(xy, 64, 1.7, threads=2)
        return "read"
    except SlideError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return str(error)


def read_all(paths: list[Path], log: Path) -> None:
    """Write what `read` says of each scan, in little memory; the process ends at one that takes too long."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
    with log.open("a") as file:
        for path in paths:
            signal.alarm(SECONDS)
            print(read(path), file=file, flush=True)


def answers(paths: list[Path], log: Path) -> list[str]:
    """What `read` says of each scan in a process of its own; CRASH for one that hangs, kills it, or raises anything but a SlideError."""
    log.touch()
    while len(found := log.read_text().splitlines()) < len(paths):
        try:
            in_child(read_all, paths[len(found) :], log, seconds=3600)
        except Crash as crash:
            with log.open("a") as file:
                print("CRASH", " ".join(str(crash).split())[-300:], file=file)
    return found


# mutations

NUMBERS = (0, 1, 2, 3, 7, 8, 255, 256, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 5, (1 << 63) - 1, (1 << 64) - 1)


def header_places(path: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of what tells how to read a TIFF: its start, each page's directory, and the values that lie elsewhere."""
    places = [(0, 16)]
    with tifffile.TiffFile(path) as tif:
        entry = 20 if tif.is_bigtiff else 12
        for page in tif.pages:
            page = page.aspage()
            places.append((page.offset, 2 + len(page.tags) * entry + 12))
            places += [(tag.valueoffset, min(4096, max(1, tag.valuebytecount))) for tag in page.tags]
            places += [(tag.offset, entry) for tag in page.tags]
            if page.dataoffsets:
                places.append((page.dataoffsets[0], min(600, page.databytecounts[0] or 1)))  # the first piece's own header
    return places


def mutate(data: bytearray, places: list[tuple[int, int]], draw: random.Random) -> None:
    """Change one to four things in the places: a byte, a number, a swap of two numbers, a run copied over another, or the file's end."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, length = draw.choice(places)
        here = at + draw.randrange(length)
        how = draw.randrange(6)
        if how == 0:
            data[here] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[here] = draw.randrange(256)
        elif how == 2:
            size = draw.choice((2, 4, 8))
            here = at + draw.randrange(length) // 2 * 2
            data[here : here + size] = (draw.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, draw.choice(("little", "big")))
        elif how == 3:
            other = draw.choice(places)[0]
            data[here : here + 4], data[other : other + 4] = data[other : other + 4], data[here : here + 4]
        elif how == 4:
            other, run = draw.choice(places)[0], draw.choice((4, 12, 20, 64))
            data[here : here + run] = data[other : other + run]
        else:
            del data[draw.randrange(16, len(data)) :]
            return


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "test3-TRITC 2 (560).ndpi"])
def test_mutated_headers_are_read_or_refused_in_one_line(test_data, tmp_path, name, count):
    source = test_data / "slides" / name
    whole, places, draw = source.read_bytes(), header_places(source), random.Random(count)
    paths = [tmp_path / f"{n}{source.suffix}" for n in range(count)]
    for path in paths:
        mutate(data := bytearray(whole), places, draw)
        path.write_bytes(data)
    found = answers(paths, tmp_path / "log")
    bad = [(path, answer) for path, answer in zip(paths, found) if answer.startswith("CRASH")]
    assert not bad, f"{len(bad)} of {count}: {bad[:20]}"
    assert count / 10 < found.count("read") < count * 0.9, Counter(found)  # else the mutations miss the header


# made by hand


def tiff(entries: list[tuple[int, int, int, int]], *, behind: bytes = b"", next_page: int = 0) -> bytes:
    """A little-endian TIFF of one page: entries (tag, type, count, value) at byte 8, `behind` after them."""
    page = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in sorted(entries)) + struct.pack("<I", next_page)
    return struct.pack("<2sHI", b"II", 42, 8) + page + behind


def page(width=256, height=256, tile=(256, 256), offsets=(1, 500), counts=(1, 100), compression=7) -> list:
    """Entries of a page of RGB tiles; offsets and counts are (how many, value)."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 2), (277, 3, 1, 3)]
    return [*entries, (322, 4, 1, tile[0]), (323, 4, 1, tile[1]), (324, 4, *offsets), (325, 4, *counts)]


def zlib_bomb(size: int) -> bytes:
    """Zeros, packed about a thousandfold."""
    packer, block = zlib.compressobj(1), bytes(1 << 20)
    parts = [packer.compress(block[: min(len(block), size - done)]) for done in range(0, size, len(block))]
    return b"".join(parts) + packer.flush()


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG that claims a size, with packed pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_saying(width: int, height: int) -> bytes:
    """A real JPEG of 256 x 256 px whose header claims another size."""
    data = bytearray(simplejpeg.encode_jpeg(np.full((256, 256, 3), 128, np.uint8)))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_scans(scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan very often: small to store, slow to decode."""
    memory = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)).save(memory, "JPEG", progressive=True, quality=1)
    data = memory.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + (data[last:-2] * scans)[:20_000_000] + data[-2:]


TILE = simplejpeg.encode_jpeg(np.full((256, 256, 3), 128, np.uint8))


def stored(data: bytes, compression: int = 7, behind: int = 8 + 2 + 12 * 10 + 4, extra: tuple = (), next_page: int = 0) -> bytes:
    """A scan of one stored tile."""
    entries = [*page(offsets=(1, behind + 12 * len(extra)), counts=(1, len(data)), compression=compression), *extra]
    return tiff(entries, behind=data, next_page=next_page)


def signed(tag: int, value: int) -> bytes:
    """A scan whose offset or byte count is a negative number."""
    good = 500 if tag == 324 else 100
    return tiff(page()).replace(struct.pack("<HHII", tag, 4, 1, good), struct.pack("<HHIi", tag, 9, 1, value))


def many_pages(count: int) -> bytes:
    """A chain of pages of one entry each."""
    return struct.pack("<2sHI", b"II", 42, 8) + b"".join(
        struct.pack("<HHHIII", 1, 256, 4, 1, 256, 8 + 18 * (n + 1) if n < count - 1 else 0) for n in range(count)
    )


def big_tiff(page: int, entries: int = 0) -> bytes:
    """A BigTIFF without entries, or with too many."""
    return struct.pack("<2sHHHQ", b"II", 43, 8, 0, page) + struct.pack("<QQ", entries, 16)


def jpeg2000(width: int) -> bytes:
    """The header of a JPEG 2000 stream of so many px."""
    size = struct.pack(">HH8IH", 47, 0, width, width, 0, 0, width, width, 0, 0, 3)
    return b"\xff\x4f\xff\x51" + size + b"\x07\x01\x01" * 3 + bytes(70)


HUGE = 2**32 - 1
SCANS = {
    "2^31 x 2^31 px": lambda: tiff(page(2**31 - 1, 2**31 - 1)),
    "2^32 px of one tile": lambda: tiff(page(HUGE, 1, (HUGE, HUGE))),
    "tile count overflows 2^64": lambda: tiff(page(HUGE, HUGE, (1, 1), (HUGE, 8), (HUGE, 8))),
    "a table of 2^30 offsets": lambda: tiff(page(2**20, 2**20, (16, 16), (2**30, 200), (2**30, 200))),
    "no tiles": lambda: tiff(page(offsets=(0, 0), counts=(0, 0))),
    "tiles of no size": lambda: tiff(page(tile=(0, 0))),
    "tiles of no width": lambda: tiff(page(tile=(0, 256))),
    "an image of no size": lambda: tiff(page(0, 0)),
    "negative offset": lambda: signed(324, -500),
    "negative count": lambda: signed(325, -100),
    "offset and count overflow 2^32": lambda: tiff(page(offsets=(1, HUGE - 4), counts=(1, HUGE - 4))),
    "a page that follows itself": lambda: stored(TILE, next_page=8),
    "subpages that hold themselves": lambda: stored(TILE, extra=((330, 4, 1, 8),)),
    "a page beyond the end": lambda: struct.pack("<2sHI", b"II", 42, HUGE),
    "65,535 entries": lambda: struct.pack("<2sHIH", b"II", 42, 8, 65535) + bytes(64),
    "20,000 pages": lambda: many_pages(20_000),
    "an entry of 2^32 texts": lambda: tiff([*page(), (270, 2, HUGE, 8)]),
    "an entry of unknown type": lambda: stored(TILE, extra=((270, 99, 1, 8),)),
    "1,000 samples a pixel": lambda: tiff([e if e[0] != 277 else (277, 3, 1, 1000) for e in page()]),
    "2,000 numbers for a compression": lambda: tiff([e if e[0] != 259 else (259, 3, 2000, 8) for e in page()], behind=bytes(4000)),
    "BigTIFF with 2^63 entries": lambda: big_tiff(16, 2**63),
    "BigTIFF page at 2^64": lambda: big_tiff(2**64 - 1),
    "BigTIFF that points at itself": lambda: big_tiff(16),
    "JPEG tile of 65,535 px": lambda: stored(jpeg_saying(65535, 65535)),
    "JPEG tile of another size": lambda: stored(jpeg_saying(512, 128)),
    "deflate tile of 1 GB": lambda: stored(zlib_bomb(1 << 30), compression=8),
    "LZW tile of noise": lambda: stored(random.Random(0).randbytes(2000), compression=5),
    "LZW bomb": lambda: stored(imagecodecs.lzw_encode(bytes(1 << 28)), compression=5),
    "PackBits tile that never ends": lambda: stored(b"\x81\x00" * 5_000_000, compression=32773),
    "Zstandard tile that says 2^62 bytes": lambda: stored(b"\x28\xb5\x2f\xfd\xc0" + struct.pack("<Q", 2**62) + bytes(9), compression=50000),
    "Zstandard bomb": lambda: stored(imagecodecs.zstd_encode(bytes(1 << 30)), compression=50000),
    "JPEG 2000 tile that says 2^31 px": lambda: stored(jpeg2000(2**31 - 1), compression=33005),
}
PICTURES = {
    "JPEG of 65,500 x 65,500 px": lambda: jpeg_saying(65500, 65500),
    "JPEG of no size": lambda: jpeg_saying(0, 0),
    "JPEG of a thousand scans": lambda: jpeg_scans(1000),
    "JPEG that ends in its header": lambda: TILE[:30],
    "PNG of 2^31 px": lambda: png(2**31 - 1, 2**31 - 1, b""),
    "PNG bomb": lambda: png(17_000, 17_000, zlib_bomb(17_000 * (3 * 17_000 + 1))),
    "PNG that ends in its header": lambda: png(4, 4, b"")[:30],
}
SOUND = {"a page that follows itself", "subpages that hold themselves", "an entry of unknown type", "LZW bomb"}  # the surplus is not read


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> dict[str, str]:
    """What is said of each."""
    folder, paths = tmp_path_factory.mktemp("hostile"), {}
    for n, (name, make) in enumerate((SCANS | PICTURES).items()):
        paths[name] = folder / f"{n}.{'tif' if name in SCANS else name[:3].lower().replace('jpe', 'jpg')}"
        paths[name].write_bytes(make())
    return dict(zip(paths, answers(list(paths.values()), folder / "log")))


@pytest.mark.parametrize("name", [*SCANS, *PICTURES])
def test_a_hostile_scan_is_refused_in_one_line(hostile, name):
    assert not hostile[name].startswith("CRASH") and (hostile[name] == "read") <= (name in SOUND), hostile[name]
