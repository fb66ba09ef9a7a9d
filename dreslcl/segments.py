"""The stored pixels of one level: which compressed segments a set of windows needs, each decoded once, copied into place.

A level is a grid of segments (TIFF tiles, strips, or one whole image), each compressed on its own. A read lists every (window, segment)
pair, walks the segments in file order, decodes each once into a reused buffer and copies it into all windows that show it. `os.pread` costs
2 % of a decode and the copies 4-7 %, so the decoder is the limit; decoders release the GIL, so threads scale. The lowest segments of a read
are kept for the next one, which in raster order begins inside them. Where openslide reads a scan, a segment is a region that it returns.

Tiles of 0.5 µm/px from a scan of 0.25 without such a level are means of 2 x 2 pixels, taken as each segment is decoded (`halved`): 50 to
90 µs, in the processor's cache, where decoding takes 290 and Pillow's box filter on whole windows took 280.
"""

import io
import os
import re
import struct
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from jaxtyping import Integer, UInt8, UInt16
from PIL import Image

from .common import SlideError

MAX_SEGMENT_BYTES = 1 << 30  # largest decoded segment: a larger claim is refused before memory is taken
CACHE_BYTES = 128 << 20  # most decoded bytes that one read keeps for the next

HALVE_BYTES = 192 << 10  # pixels halved at a time: they and their sums stay in the processor's cache

RGB, YCBCR = 2, 6  # TIFF's photometric interpretations
JPEG, JPEG2000, JPEG2000_YCBCR = 7, (33003, 33004, 33005, 34712), 33003
LOSSLESS = (1, 5, 8, 32946, 32773, 50000)  # uncompressed, LZW, deflate (two numbers), PackBits, Zstandard
DAMAGED = "the file is damaged or incomplete; copy it again from its source"

Decoded = tuple[np.ndarray, np.ndarray]  # pixels (h, w, 3), and the buffer behind them
Decoder = Callable[[bytes, int, np.ndarray], np.ndarray]  # stored bytes, index, buffer -> pixels (h, w, 3), in the buffer or not


class DecodeCache:
    """Decoded segments of one level that a read keeps for the next, and buffers to use again. One read at a time owns it."""

    def __init__(self):
        self.decoded: dict[int, Decoded] = {}
        self.spare: list[np.ndarray] = []  # a fresh one costs page faults

    def buffer(self, edge: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
        """Room for one segment of `edge` (w, h)."""
        try:
            return self.spare.pop()
        except IndexError:  # no `if`: other threads of this read take buffers too
            room, size = np.empty(3 * edge[0] * edge[1] + 32, np.uint8), 3 * edge[0] * edge[1]
            start = (8 - room.ctypes.data) % 32  # into rows at a multiple of 32 bytes libjpeg-turbo writes past the processor's cache
            return room[start : start + size].reshape(edge[1], edge[0], 3)

    def update(self, new: dict[int, Decoded], columns: int) -> None:
        """Replace what is held of the columns in `new`; the oldest goes where more than CACHE_BYTES would be held."""
        touched = {index % columns for index in new}
        for index in [index for index in self.decoded if index % columns in touched]:
            self.spare.append(self.decoded.pop(index)[1])
        self.decoded |= new
        held = sum(buffer.nbytes for _, buffer in self.decoded.values())
        for index in list(self.decoded)[:-1]:
            if held > CACHE_BYTES:
                held -= self.decoded.pop(index)[1].nbytes


@dataclass(frozen=True)
class Segments:
    """One level as it lies in the file. Segment i covers column i % grid[0], row i // grid[0]; a byte count of 0 is blank (white)."""

    name: str  # what errors call it
    size: tuple[int, int]  # (w, h) of the level, pixels
    edge: tuple[int, int]  # (w, h) of a segment; those at the right and bottom may be stored cut
    offsets: Integer[np.ndarray, "S"]
    counts: Integer[np.ndarray, "S"]
    decode: Decoder
    planes: int = 1  # 3 or 4 where red, green, blue (and alpha) lie in separate segments
    in_file: bool = True  # else `decode` finds a segment by its index; no bytes are read for it
    whole: "Segments | None" = None  # the level that this one is half of

    def __post_init__(self) -> None:
        (w, h), found = self.edge, {len(self.offsets), len(self.counts)}
        if min(*self.size, w, h) < 1:
            raise SlideError(f"{self.name}: an image of {self.size} px in tiles of {self.edge} px cannot be; {DAMAGED}")
        if 3 * w * h > MAX_SEGMENT_BYTES:
            raise SlideError(f"{self.name}: one stored piece has {w} x {h} px, too much to decode at once; convert it to a tiled TIFF")
        expected = self.planes * self.grid[0] * self.grid[1]
        if found != {expected}:
            raise SlideError(f"{self.name}: {min(found)} whole entries of stored tiles where its size asks for {expected}; {DAMAGED}")

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows of segments."""
        return -(-self.size[0] // self.edge[0]), -(-self.size[1] // self.edge[1])

    def halved(self) -> "Segments | None":
        """This level at half its resolution, each pixel the mean of 2 x 2; none where the pixels of a segment do not pair."""
        if any(side % 2 for side in (*self.size, *self.edge)):
            return None
        size, edge = ((w // 2, h // 2) for w, h in (self.size, self.edge))
        return replace(self, size=size, edge=edge, whole=self)

    def check_inside(self, file_bytes: int) -> None:
        """Raise SlideError if a segment lies outside a file of so many bytes."""
        ends = self.offsets + self.counts
        bad = (self.counts < 0) | ((self.counts > 0) & ((self.offsets < 0) | (ends > file_bytes) | (ends < 0)))
        if bad.any():
            raise SlideError(f"{self.name}: {bad.sum()} of {len(bad)} stored tiles lie beyond the end of the file; {DAMAGED}")

    def load(self, fd: int, index: int, buffer: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"] | None:
        """Pixels of one segment, in `buffer` where the decoder can; none for a blank one.

        Raises SlideError: it cannot be read or decoded, or is not of the stated size.
        """
        if self.whole:
            pixels = self.whole.load(fd, index, buffer)
            return None if pixels is None else halve(np.require(pixels, requirements="W"))
        try:
            parts = range(index, len(self.offsets), len(self.offsets) // self.planes)
            stored = [os.pread(fd, int(self.counts[i]), int(self.offsets[i])) for i in parts]
            if any(len(data) != self.counts[i] for i, data in zip(parts, stored)):
                raise EOFError("it runs past the end of the file")
            if self.in_file and not all(stored):
                return None
            pixels = self.decode(stored[0], index, buffer)
            if self.planes > 1:
                pixels = np.concatenate([pixels, *(self.decode(data, index, buffer) for data in stored[1:])], axis=2)
            if pixels.shape[2] == 4:  # what is wholly transparent was never scanned
                pixels = np.where(pixels[..., 3:] == 0, np.uint8(255), pixels[..., :3])
            (h, w, colours), columns = pixels.shape, self.grid[0]
            for got, edge, size, at in zip((w, h), self.edge, self.size, (index % columns, index // columns)):
                if got not in (edge, size - at * edge) or colours != 3:  # whole, or cut at the border of the level
                    raise ValueError(f"it holds {w} x {h} px of {colours} colours, not {self.edge[0]} x {self.edge[1]} of 3")
            return pixels
        except Exception as error:  # codecs raise what they like
            raise SlideError(f"{self.name}: stored tile {index} cannot be decoded ({error}); {DAMAGED}") from error

    def read(self, fd: int, corners: Integer[np.ndarray, "N 2"], windows: np.ndarray, cache: DecodeCache, pool: Executor | None) -> None:
        """Fill `windows` (N, h, w, 3) with the pixels right and below `corners` (level pixels); what lies outside the level stays as it is.

        `cache` holds segments of this level decoded by an earlier read, and holds those for the next one afterwards.
        """
        shape, room = np.array(windows.shape[2:0:-1]), (self.whole or self).edge
        segments, starts, copies = self._plan(corners, shape)
        worth = len(copies) >= 1.25 * len(segments) or 3 * self.edge[0] * self.edge[1] > 4 << 20  # they are shared, or large
        keep = set({index % self.grid[0]: index for index in np.sort(segments).tolist()}.values()) if worth else ()  # each column's lowest

        def run(job: slice) -> dict[int, Decoded]:
            kept, buffer = {}, cache.buffer(room)
            bounds = starts[job.start : job.stop + 1].tolist()
            table = copies[bounds[0] : bounds[-1]].tolist()
            for index, first, last in zip(segments[job].tolist(), bounds, bounds[1:]):
                pixels, _ = cache.decoded.get(index, (None, None))
                if pixels is None:
                    pixels = self.load(fd, index, buffer)
                    if pixels is not None and index in keep:
                        kept[index] = pixels, buffer
                        buffer = cache.buffer(room)
                for window, top, bottom, left, right, y, x in table[first - bounds[0] : last - bounds[0]]:
                    target = windows[window, top:bottom, left:right]
                    target[...] = 255 if pixels is None else pixels[y : y + bottom - top, x : x + right - left]
            cache.spare.append(buffer)
            return kept

        jobs = [slice(i, i + 64) for i in range(0, len(segments), 64)]
        kept = (pool.map if pool else map)(run, jobs)
        cache.update({index: decoded for part in list(kept) for index, decoded in part.items()}, self.grid[0])

    def _plan(self, corners: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Segments in file order, where each one's copies start, and the copies (window, top, bottom, left, right, y, x)."""
        edge, size, grid = np.array(self.edge), np.array(self.size), np.array(self.grid)
        first = np.maximum(corners // edge, 0)
        spans = np.maximum(np.minimum((corners + shape - 1) // edge, grid - 1) - first + 1, 0)
        count = spans.prod(axis=1) * (corners < size).all(axis=1)  # a last segment reaches beyond the level
        window = np.repeat(np.arange(len(corners)), count)
        nth = np.arange(len(window)) - np.repeat(count.cumsum() - count, count)
        place = first[window] + np.stack([nth % spans[window, 0], nth // spans[window, 0]], axis=1)
        segment = place[:, 1] * grid[0] + place[:, 0]
        order = np.lexsort((segment, self.offsets[segment]))
        window, place, segment = window[order], place[order], segment[order]
        low = np.maximum(corners[window], place * edge)
        high = np.minimum(np.minimum(corners[window] + shape, (place + 1) * edge), size)
        (left, top), (right, bottom), (x, y) = (low - corners[window]).T, (high - corners[window]).T, (low - place * edge).T
        starts = np.flatnonzero(np.diff(segment, prepend=-1))
        return segment[starts], np.append(starts, len(segment)), np.stack([window, top, bottom, left, right, y, x], axis=1)


def halve(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The mean of every 2 x 2 pixels, halves rounded up, in the top left quarter of `pixels`, whose sides are even."""
    out = pixels[: len(pixels) // 2, : pixels.shape[1] // 2]
    rows = 2 * max(1, HALVE_BYTES // (2 * pixels[0].nbytes))
    for y in range(0, len(pixels), rows):
        mean = _means(np.add(pixels[y : y + rows : 2], pixels[y + 1 : y + rows : 2], dtype=np.uint16).ravel())
        for colour in range(3):
            out[y // 2 : (y + rows) // 2, :, colour] = mean[colour::6].reshape(-1, out.shape[1])
    return out


def _means(two: UInt16[np.ndarray, "*h w3"]) -> UInt8[np.ndarray, "*h w3-3"]:
    """From sums of two rows the mean of each pixel and its right neighbour, halves rounded up."""
    four = two[..., 3:] + two[..., :-3]  # every second is of use; to pick them first would take three times as long
    four += 2
    four >>= 2
    return four.astype(np.uint8)


def shrink(pixels: UInt8[np.ndarray, "h w 3"], corner: tuple[float, float], edge: float, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A square of `edge` pixels at `corner` (x, y) as `size` pixels, from 1 to 2 of each side in each: the pixels of Pillow's box filter,
    three times as fast. Each is the mean of those whose middle lies in it, halves rounded up once, where Pillow rounds twice.
    """
    columns, rows = (np.floor(at + np.arange(size + 1) * edge / size + 0.5).astype(int) for at in corner)
    two = pixels[rows[:-1]].astype(np.uint16)
    two += pixels[rows[1:] - 1]  # the same row again, where it is the only one
    left, single = columns[:-1], np.flatnonzero(np.diff(columns) == 1)
    out = _means(two.reshape(size, -1)).view("V3").take(left, axis=1, mode="clip").view(np.uint8).reshape(size, size, 3)
    out[:, single] = (two[:, left[single]] + 1) >> 1
    return out


def from_page(page: Any, name: str) -> Segments:
    """The segments of a tifffile page. Raises SlideError: not 8-bit colour, or a compression that is not read."""
    key, only = page.keyframe, "only 8-bit RGB scans can be tiled"
    samples, planes = key.samplesperpixel, key.samplesperpixel if key.planarconfig == 2 else 1
    shown = 4 if samples == 4 and key.extrasamples in ((1,), (2,)) else 3  # with alpha, associated or not
    if samples not in (3, 4) or key.photometric not in (RGB, YCBCR):
        what = f"{samples} channel(s), {_brief(key.photometric)}, not RGB"
        raise SlideError(f"{name}: {what}; {only} (convert it or take a brightfield scan)")
    if key.bitspersample != 8 or key.dtype != np.uint8:
        raise SlideError(f"{name}: {_brief(key.bitspersample)}-bit pixels; {only} (convert it to 8-bit)")
    if key.imagedepth != 1 or key.tiledepth != 1:
        raise SlideError(f"{name}: a volume, not an image; {only}")
    edge = (key.tilewidth, key.tilelength) if key.is_tiled else (key.imagewidth, min(key.rowsperstrip, key.imagelength))
    if key.compression == JPEG and planes == 1 and samples == 3:
        decode = _jpeg(key)
    elif key.compression in JPEG2000 and planes == 1:
        decode = _jpeg2000(edge, key.compression == JPEG2000_YCBCR)
    elif key.compression in LOSSLESS and key.photometric == RGB:

        def decode(data: bytes, index: int, buffer: np.ndarray) -> np.ndarray:
            return key.decode(data, index)[0][0, ..., : shown if planes == 1 else 1]

    else:
        how = f"photometric {int(key.photometric)}, planar {key.planarconfig}"
        raise SlideError(f"{name}: {_brief(key.compression)} compression ({how}) is not read; convert it")
    planes = min(planes, shown)
    wanted = None if planes == 1 else planes * (len(page.dataoffsets) // samples)
    offsets, counts = (np.array(values, np.int64)[:wanted] for values in (page.dataoffsets, page.databytecounts))
    return Segments(name, (key.imagewidth, key.imagelength), edge, offsets, counts, decode, planes)


def _brief(value: Any) -> str:
    """The name of a tag's value; a damaged entry may hold thousands of numbers."""
    return str(getattr(value, "name", value))[:20]


def from_image(data: bytes, name: str) -> Segments:
    """A PNG or JPEG file as one segment. Raises SlideError: it is no such image, or not 8-bit colour."""
    is_jpeg = data[:2] == b"\xff\xd8"
    try:
        if is_jpeg:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            colour = space in ("RGB", "YCbCr")
        else:
            width, height, bits, kind = struct.unpack_from(">IIBB", data, 16)
            colour = bits == 8 and kind in (2, 6)
    except (ValueError, struct.error) as error:
        raise SlideError(f"{name}: the image cannot be decoded ({error}); {DAMAGED}") from error
    if not colour:
        raise SlideError(f"{name}: not an 8-bit RGB image; convert it to one")

    def decode(data: bytes, _: int, buffer: np.ndarray) -> np.ndarray:
        return simplejpeg.decode_jpeg(data, "RGB", buffer=buffer) if is_jpeg else imagecodecs.png_decode(data)

    return Segments(name, (width, height), (width, height), np.array([0]), np.array([len(data)]), decode)


def _jpeg(page: Any) -> Decoder:
    """JPEG tiles: the tables that all share and the colour space that TIFF states go in front of each one's stream.

    Without an Adobe marker a decoder takes three components for YCbCr; Aperio stores RGB that way. NDPI's strips are pieces
    between the restart markers of one huge JPEG: each gets its header and an end of its own.
    """
    header, is_rgb = page.jpegheader, page.photometric == RGB and not page.is_jfif
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if is_rgb else b"\x01")
    tables = b"\xff\xd8" + adobe + (page.jpegtables or b"")[2:-2]

    def decode(data: bytes, _: int, buffer: np.ndarray) -> np.ndarray:
        if not re.search(rb"\xff[\xd0-\xd7\xd9]\Z", data[-2:]) if header else data[:2] != b"\xff\xd8":
            raise ValueError("no JPEG stream where the file says one lies")
        stream = header + data[:-2] + b"\xff\xd9" if header else tables + data[2:]
        try:
            return simplejpeg.decode_jpeg(stream, "RGB", buffer=buffer)
        except ValueError as error:
            padding = re.search(r"(\d+) extraneous bytes before marker 0xd9", str(error))
            if not padding or int(padding[1]) > 16:  # a few bytes before the end marker harm nothing; anything else is damage
                raise
            return simplejpeg.decode_jpeg(stream, "RGB", buffer=buffer, strict=False)

    return decode


def _jpeg2000(edge: tuple[int, int], is_ycbcr: bool) -> Decoder:
    """JPEG 2000 tiles. Aperio's 33003 is YCbCr and says so nowhere in the stream; OpenJPEG converts it where chroma is subsampled."""

    def decode(data: bytes, _: int, buffer: np.ndarray) -> np.ndarray:
        start = data.find(b"\xff\x4f\xff\x51")  # codestream, then its size and components
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        components, *steps = struct.unpack_from(">H9B", data, start + 40)
        if start < 0 or right - left > edge[0] or bottom - top > edge[1] or components not in (3, 4):
            raise ValueError("no JPEG 2000 stream of the stated size")
        pixels = imagecodecs.jpeg2k_decode(data)[..., :3]
        if is_ycbcr and steps[4] == 1:  # chroma as wide as luma
            pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels), mode="YCbCr").convert("RGB"))
        return pixels

    return decode


# Scans that openslide reads (the extra [openslide])


class OpenSlideFile(io.FileIO):
    """The file that openslide opens a scan by, and its handle on all files of the scan."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.path = path
        self._handles: dict[int, Any] = {}  # of each process: locks that a parent's threads hold stay shut in its child

    def handle(self) -> Any:
        """openslide's handle, which threads may share. Raises OpenSlideError: openslide cannot open the scan."""
        from openslide import OpenSlide

        handle = self._handles.get(os.getpid())
        if handle is None:
            handle = self._handles[os.getpid()] = OpenSlide(self.path)
        return handle

    def region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """What openslide's `read_region` returns. Raises OpenSlideError: the files are damaged or gone."""
        from openslide import OpenSlide, OpenSlideError

        try:
            return self.handle().read_region(location, level, size)
        except OpenSlideError:  # the handle is of no use from then on, nor was it to other threads: a fresh one tells who is at fault
            self._handles.pop(os.getpid(), None)
            return OpenSlide(self.path).read_region(location, level, size)

    def close(self) -> None:
        """Close the file; the handle closes when the last read is done with it."""
        super().close()
        self._handles.clear()


def from_openslide(path: Path, what: str) -> tuple[OpenSlideFile, list[Segments], dict[str, str]]:
    """A scan's file, levels and properties by openslide, whatever `what` it is.

    Raises SlideError: openslide is not installed, or cannot open the scan.
    """
    try:
        from openslide import OpenSlideError
    except ImportError as error:  # the package, or the library behind it
        raise SlideError(f"{path.name}: {what}, which openslide reads; install it with: pip install 'dreslcl[openslide]'") from error
    file = OpenSlideFile(path)
    try:
        properties, count = dict(file.handle().properties), file.handle().level_count
    except OpenSlideError as error:
        file.close()
        why = " ".join(str(error).split())[:120]
        raise SlideError(f"{path.name}: {what} that openslide cannot open ({why}); copy all its files again, or convert it") from error
    return file, [_openslide_level(file, index, properties) for index in range(count)], properties


def _openslide_level(file: OpenSlideFile, level: int, properties: dict[str, str]) -> Segments:
    size, downsample = file.handle().level_dimensions[level], file.handle().level_downsamples[level]
    w, h = (int(properties.get(f"openslide.level[{level}].tile-{side}", 256)) for side in ("width", "height"))
    columns, rows = -(-size[0] // w), -(-size[1] // h)

    def decode(_: bytes, index: int, buffer: np.ndarray) -> np.ndarray:
        x, y = index % columns * w, index // columns * h
        location = round(x * downsample), round(y * downsample)
        region = file.region(location, level, (min(w, size[0] - x), min(h, size[1] - y)))
        everywhere = region.getchannel("A").getextrema()[0] > 0
        return np.asarray(region.convert("RGB") if everywhere else region)  # `load` makes what is transparent white, more slowly

    nowhere = np.zeros(columns * rows, np.int64)
    return Segments(f"{file.path.name}: level {level}", size, (w, h), nowhere, nowhere, decode, in_file=False)
