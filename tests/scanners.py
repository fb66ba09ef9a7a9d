"""Scans in formats that openslide reads, written after the formats' descriptions. Lossless but for VMS, of any picture."""

import io
import struct
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def shrunk(image: np.ndarray, factor: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).reduce(factor))


def _element(group: int, number: int, kind: str, value: str | bytes | int) -> bytes:
    if isinstance(value, int):
        value = struct.pack("<I" if kind == "UL" else "<H", value)
    value = value.encode() if isinstance(value, str) else value
    value += (b"\0" if kind in ("UI", "OB") else b" ") * (len(value) % 2)
    long = kind in ("OB", "SQ")
    return struct.pack("<HH2s" + ("xxI" if long else "H"), group, number, kind.encode(), len(value)) + value


def _sequence(group: int, number: int, inside: bytes) -> bytes:
    return _element(group, number, "SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(inside)) + inside)


def write_dicom(path: Path, image: np.ndarray, *, series: str = "1.2.3", instance: int = 1, mpp: float = 0.5, tile: int = 128) -> Path:
    """One level, in a file of its own: uncompressed tiles, those at the border padded."""
    h, w = image.shape[:2]
    padded = np.pad(image, ((0, -h % tile), (0, -w % tile), (0, 0)))
    frames = [padded[y : y + tile, x : x + tile].tobytes() for y in range(0, h, tile) for x in range(0, w, tile)]
    wsi, name = "1.2.840.10008.5.1.4.1.1.77.1.6", f"{series}.{instance}"
    meta = _element(2, 2, "UI", wsi) + _element(2, 3, "UI", name) + _element(2, 0x10, "UI", "1.2.840.10008.1.2.1")
    other = _sequence(8, 0x1115, _element(0x20, 0xE, "UI", "9.9.9"))  # a series that it refers to
    measures = _sequence(0x28, 0x9110, _element(0x28, 0x30, "DS", f"{mpp / 1000:g}\\{mpp / 1000:g}"))
    data = [
        *(_element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"), _element(8, 0x16, "UI", wsi), _element(8, 0x18, "UI", name), other),
        *(_element(0x20, 0xD, "UI", "1.2"), _element(0x20, 0xE, "UI", series), _element(0x20, 0x9311, "CS", "TILED_FULL")),
        *(
            _element(0x28, 2, "US", 3),
            _element(0x28, 4, "CS", "RGB"),
            _element(0x28, 6, "US", 0),
            _element(0x28, 8, "IS", str(len(frames))),
        ),
        *(_element(0x28, 0x10, "US", tile), _element(0x28, 0x11, "US", tile), _element(0x28, 0x100, "US", 8)),
        *(_element(0x28, 0x101, "US", 8), _element(0x28, 0x102, "US", 7), _element(0x28, 0x103, "US", 0)),
        *(_element(0x48, 6, "UL", w), _element(0x48, 7, "UL", h), _sequence(0x5200, 0x9229, measures)),
        _element(0x7FE0, 0x10, "OB", b"".join(frames)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + _element(2, 0, "UL", len(meta)) + meta + b"".join(data))
    return path


def dicom(folder: Path, image: np.ndarray) -> Path:
    """Three levels in three files."""
    for n, factor in enumerate((4, 1, 2)):
        write_dicom(folder / "case" / f"{n}.dcm", shrunk(image, factor), instance=n, mpp=0.5 * factor)
    return folder / "case" / "0.dcm"


def mrxs(folder: Path, image: np.ndarray) -> Path:
    """Photos of 128 px that overlap by 16, at two levels; photo (1, 1) is missing from level 0, and none reaches beyond the picture."""
    columns, rows = ((side - 16) // 112 // 2 * 2 for side in image.shape[1::-1])
    photos = {(x, y): image[112 * y : 112 * y + 128, 112 * x : 112 * x + 128] for y in range(rows) for x in range(columns)}
    halves = {place: shrunk(photo, 2) for place, photo in photos.items()}
    fours = {
        (x, y): np.vstack([np.hstack([halves[x + i, y + j] for i in (0, 1)]) for j in (0, 1)]) for x, y in photos if not (x % 2 or y % 2)
    }
    photos.pop((1, 1))
    data, index, pages = b"", b"01.02" + b"synthetic", []
    for level in (photos, fours):
        records = []
        for (x, y), picture in level.items():
            Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
            records.append(struct.pack("<4i", y * columns + x, len(data), len(file.getvalue()), 0))
            data += file.getvalue()
        pages.append(struct.pack("<2i", len(records), 0) + b"".join(records))
    at = len(index) + 8  # of the two pointers, each to (0, a pointer to its page)
    first = at + 8 + 16
    index += struct.pack("<8i", at, 0, at + 8, at + 16, 0, first, 0, first + len(pages[0])) + b"".join(pages)
    sections = "".join(
        f"[L{n}]\nIMAGE_CONCAT_FACTOR={n}\nOVERLAP_X={16 >> n}\nOVERLAP_Y={16 >> n}\nMICROMETER_PER_PIXEL_X={0.5 * 2**n}\n"
        f"MICROMETER_PER_PIXEL_Y={0.5 * 2**n}\nIMAGE_FILL_COLOR_BGR=0\nDIGITIZER_WIDTH=128\nDIGITIZER_HEIGHT=128\nIMAGE_FORMAT=PNG\n"
        for n in (0, 1)
    )
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "Slidedat.ini").write_text(
        f"[GENERAL]\nSLIDE_VERSION=01.02\nSLIDE_ID=synthetic\nIMAGENUMBER_X={columns}\nIMAGENUMBER_Y={rows}\nOBJECTIVE_MAGNIFICATION=20\n"
        "[HIERARCHICAL]\nHIER_COUNT=1\nNONHIER_COUNT=0\nINDEXFILE=Index.dat\nHIER_0_NAME=Slide zoom level\nHIER_0_COUNT=2\n"
        f"HIER_0_VAL_0_SECTION=L0\nHIER_0_VAL_1_SECTION=L1\n[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data0000.dat\n{sections}"
    )
    (folder / "a" / "Index.dat").write_bytes(index)
    (folder / "a" / "Data0000.dat").write_bytes(data)
    Image.fromarray(image[:32, :32]).save(folder / "a.mrxs", "JPEG")  # a preview
    return folder / "a.mrxs"


def trestle(folder: Path, image: np.ndarray) -> Path:
    """One level of tiles that overlap by 16 px; its resolution tags hold µm/px."""
    columns, rows = ((side - 16) // 112 for side in image.shape[1::-1])
    tiles = [np.ascontiguousarray(image[112 * y : 112 * y + 128, 112 * x : 112 * x + 128]) for y in range(rows) for x in range(columns)]
    says = {"software": "MedScan 1", "description": "Objective Power=20;OverlapsXY= 16 16", "resolution": (0.5, 0.5), "metadata": None}
    layout = {"shape": (128 * rows, 128 * columns, 3), "dtype": np.uint8, "tile": (128, 128), "photometric": "rgb"}
    tifffile.imwrite(folder / "a.tif", iter(tiles), **layout, **says)
    return folder / "a.tif"


def vms(folder: Path, image: np.ndarray) -> Path:
    """One JPEG with restart markers, and a map, in files that the .vms names."""
    for name, picture in (("a 1.jpg", image), ("map.jpg", shrunk(image, 4))):
        Image.fromarray(picture).save(folder / name, quality=95, subsampling=0, restart_marker_rows=1)
    size = "".join(f"Physical{side}={500 * pixels}\n" for side, pixels in (("Width", image.shape[1]), ("Height", image.shape[0])))
    names = "NoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile=a 1.jpg\nMapFile=map.jpg\n"
    (folder / "a.vms").write_text(f"[Virtual Microscope Specimen]\n{names}{size}SourceLens=20\n")
    return folder / "a.vms"
