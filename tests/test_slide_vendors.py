"""Every layout and colour `Slide` promises. All vendor files here are synthetic: written with tifffile after the format's description."""

import re
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image
from scanners import shrunk

from dreslcl.common import SlideError
from dreslcl.slide import Slide

JPEG = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (1, 1), "metadata": None}
LABEL = np.full((64, 64, 3), (255, 0, 255), np.uint8)  # nothing of this may ever be read
TILE = {"tile": (256, 256)}


def picture(width: int, height: int) -> np.ndarray:
    """Smooth, strongly coloured, without symmetry: a wrong colour, place or scale shows. No magenta."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = 40 + 160 * x / width, 120 + 80 * np.sin(x / 37) * np.cos(y / 53), 20 + 140 * y / height
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def write(path: Path, *pages: tuple[np.ndarray, dict], **kwargs) -> Path:
    with tifffile.TiffWriter(path, **kwargs) as writer:
        for image, options in pages:
            writer.write(image, **{**JPEG, **options})
    return path


def shows(path: Path, image: np.ndarray) -> None:
    with Slide.open(path, mpp=0.5) as slide:
        check(slide, image)


def check(slide: Slide, image: np.ndarray, tolerance: float = 2.5) -> None:
    """The whole scan at full and half resolution equals the source picture, and tiles beyond its edge end in white."""
    height, width = image.shape[:2]
    assert slide.size == (width, height)
    whole, half = slide.read_region((0, 0), 0, (width, height)), slide.thumbnail(2 * slide.mpp)
    assert np.abs(whole.astype(int) - image).mean() < tolerance
    assert np.abs(half.astype(int) - shrunk(image, 2)[: len(half), : len(half[0])]).mean() < tolerance
    corner = slide.read_tiles(np.array([[width - 50, height - 30]]), 100, slide.mpp)[0]
    assert (corner[31:] == 255).all() and (corner[:, 51:] == 255).all()
    assert np.array_equal(corner[:30, :50], whole[-30:, -50:])


# -- vendors: each writes a file of the picture at three levels or two, with label and macro where the vendor has them ----------------


def per_cm(mpp: float) -> dict:
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}


def svs(path: Path, image: np.ndarray) -> Path:
    facts = {"description": "Aperio Image Library v12\n900x700 (240x240) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990", "tile": (240, 240)}
    labels = [(LABEL, {"rowsperstrip": 16, "subfiletype": kind}) for kind in (1, 9)]
    return write(path, (image, facts), (LABEL, {"rowsperstrip": 16}), (shrunk(image, 4), facts), *labels)


def ndpi(path: Path, image: np.ndarray) -> Path:
    """NDPI's tags: strips between restart markers; its 8-byte offsets only the real file has."""
    pages = []
    for factor in (1, 2, 4):
        level = shrunk(image, factor)
        Image.fromarray(level).save(path.with_suffix(".jpg"), quality=95, subsampling=0, restart_marker_rows=1)
        jpeg = path.with_suffix(".jpg").read_bytes()
        start = jpeg.index(b"\xff\xda") + 2 + struct.unpack(">H", jpeg[jpeg.index(b"\xff\xda") + 2 :][:2])[0]
        starts = [start] + [m.end() for m in re.finditer(rb"\xff[\xd0-\xd7]", jpeg) if m.start() > start]
        tags = [(271, "s", 0, "Hamamatsu", True), (65420, "I", 1, 1, True), (65421, "f", 1, 40.0 / factor, True)]
        tags += [(65426, "I", len(starts), starts, True)]
        options = {"shape": level.shape, "dtype": np.uint8, "rowsperstrip": level.shape[0], "extratags": tags}
        pages.append((iter([jpeg]), options | per_cm(0.25 * factor)))
    return write(path, *pages)


def scn_image(name: str, image: np.ndarray, first: int, x: int = 0) -> str:
    h, w = image.shape[:2]
    levels = "".join(f'<dimension sizeX="{w // f}" sizeY="{h // f}" r="{r}" ifd="{first + r}"/>' for r, f in enumerate((1, 4)))
    view = f'<view sizeX="{w * 500}" sizeY="{h * 500}" offsetX="{x}" offsetY="0"/>'
    return f'<image name="{name}"><pixels sizeX="{w}" sizeY="{h}">{levels}</pixels>{view}</image>'


def scn(path: Path, *images: np.ndarray) -> Path:
    xml = "".join(scn_image(f"region {n}", image, 1 + 2 * n, x=n * 10**7) for n, image in enumerate(images))
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="x" sizeX="1" sizeY="1">'
        '<image name="macro"><pixels sizeX="64" sizeY="64"><dimension sizeX="64" sizeY="64" r="0" ifd="0"/></pixels></image>'
        f"{xml}</collection></scn>"
    )
    pages = [(shrunk(image, f), TILE | per_cm(0.5 * f)) for image in images for f in (1, 4)]
    return write(path, (LABEL, {"tile": (64, 64), "description": xml}), *pages)


def philips(path: Path, image: np.ndarray) -> Path:
    """Its levels are padded to whole tiles."""
    spacing = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">'
        f'"{0.00025 * f}" "{0.00025 * f}"</Attribute></DataObject>'
        for f in (1, 2, 4)
    )
    xml = f'<?xml version="1.0"?><DataObject ObjectType="DPUfsImport"><Attribute><Array>{spacing}</Array></Attribute></DataObject>'
    levels = [np.pad(shrunk(image, f), ((0, -(image.shape[0] // f) % 512), (0, -(image.shape[1] // f) % 512), (0, 0))) for f in (2, 4)]
    first = {"tile": (512, 512), "software": "Philips DP v1.0", "description": xml}
    macro = (LABEL, {"rowsperstrip": 64, "description": "Macro"})
    return write(path, (image, first), *((level, {"tile": (512, 512)}) for level in levels), macro)


def bif(path: Path, image: np.ndarray, stitch: bytes = b"<EncodeInfo/>") -> Path:
    xmp = b'<?xml version="1.0"?><Metadata><iScan Magnification="40" ScanRes="0.2325"/></Metadata>'
    tags = {"extratags": [(700, "B", len(xmp), xmp, True)], "software": "ScanOutputManager 1.1"}
    levels = [(shrunk(image, f), TILE | {"description": f"level={f - 1} mag={40 // f} quality=95"}) for f in (1, 2)]
    levels[0][1]["extratags"] = [(700, "B", len(stitch), stitch, True)]
    label = (LABEL, tags | {"tile": (64, 64), "description": "Label Image"})
    return write(path, label, (LABEL, {"tile": (64, 64), "description": "Probability_Image"}), *levels)


def qptiff(path: Path, image: np.ndarray) -> Path:
    xml = "<PerkinElmer-QPI-ImageDescription><ObjectiveName>20x</ObjectiveName></PerkinElmer-QPI-ImageDescription>"
    first = TILE | {"software": "PerkinElmer-QPI", "description": xml} | per_cm(0.5)
    label = (LABEL, {"rowsperstrip": 16})
    return write(path, (image, first), label, *((shrunk(image, f), TILE | {"subfiletype": 1}) for f in (2, 4)), label)


def ome(path: Path, image: np.ndarray) -> Path:
    metadata = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.26, "PhysicalSizeYUnit": "µm"}
    options = {"photometric": "rgb", "tile": (256, 256), "compression": "deflate", "predictor": True}
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as writer:
        writer.write(image, subifds=2, metadata=metadata, **options)
        for f in (2, 4):
            writer.write(shrunk(image, f), subfiletype=1, **options)
    return path


def generic(path: Path, image: np.ndarray, nested: bool = False) -> Path:
    scale = TILE | {"resolution": (50800, 50800), "resolutionunit": "INCH"} | ({"subifds": 2} if nested else {})
    levels = [(shrunk(image, f), TILE | {"subfiletype": int(nested)}) for f in (2, 4)]
    return write(path, (image, scale), *levels, bigtiff=True)


VENDOR_FILES = {
    "svs": (svs, "a.svs", "aperio", 0.499, "Aperio MPP", [1, 4]),
    "ndpi": (ndpi, "a.tif", "hamamatsu", 0.25, "TIFF resolution", [1, 2, 4]),
    "scn": (scn, "a.scn", "leica", 0.5, "TIFF resolution", [1, 4]),
    "philips": (philips, "a.tiff", "philips", 0.25, "Philips pixel spacing", [1, 2, 4]),
    "bif": (bif, "a.bif", "ventana", 0.2325, "Ventana ScanRes", [1, 2]),
    "qptiff": (qptiff, "a.qptiff", "akoya", 0.5, "TIFF resolution", [1, 2, 4]),
    "ome": (ome, "a.ome.tif", "ome", 0.255, "OME PhysicalSize", [1, 2, 4]),
    "pages": (generic, "a.tif", "generic", 0.5, "TIFF resolution", [1, 2, 4]),
    "subifds": (lambda path, image: generic(path, image, True), "a.tif", "generic", 0.5, "TIFF resolution", [1, 2, 4]),
}


@pytest.mark.parametrize("kind", VENDOR_FILES)
def test_a_vendors_file_shows_its_scan_at_its_resolution_and_never_its_label(tmp_path, kind):
    writer, name, vendor, mpp, source, downsamples = VENDOR_FILES[kind]
    image = picture(1024, 512) if kind == "philips" else picture(1100, 900) if kind == "pages" else picture(1024, 640)
    with Slide.open(writer(tmp_path / name, image)) as slide:
        assert (slide.vendor, slide.mpp_source, slide.mpp) == (vendor, source, pytest.approx(mpp))
        assert [level.downsample for level in slide.levels] == downsamples
        if kind == "ndpi":
            assert slide._parts[0][0][1].edge[1] == 8
        if vendor == "ome":
            assert slide.mpp_xy == pytest.approx((0.25, 0.26))
        check(slide, image)


def test_svs_whose_scan_is_missing_does_not_show_the_label(tmp_path):
    pages = [(LABEL, {"rowsperstrip": 16, "subfiletype": kind, "description": "Aperio\nlabel 64x64"}) for kind in (1, 9)]
    refused(write(tmp_path / "a.svs", *pages), "only label or overview")


# -- numbers and units as they are written -------------------------------------------------------------------------------------------

SMALL = picture(300, 200)
UNITS = "µm μm um micron Microns micrometer Micrometres &#181;m &#xB5;m &micro;m Âµm Î¼m \\u00B5m \ufffdm u".split()
LENGTHS = dict.fromkeys(UNITS, 1.0) | {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "inch": 25400.0, "m": 1e6, "pixel": None, "reference frame": None}
TEXTS = {
    "Aperio MPP = .2520": "Aperio Image Library\r\nx|AppMag = 40|MPP = .2520|Left = 3,2",
    "Aperio MPP=0,2520": "Aperio Image Library\r\nx|MPP=0,2520",
    "Aperio MPP = 2,52e-1": "Aperio Image Library\r\nx|MPP = 2,52e-1",
    "Akoya 0,252": "<PerkinElmer-QPI-ImageDescription><PixelSizeMicrons>0,252</PixelSizeMicrons></PerkinElmer-QPI-ImageDescription>",
    "Philips 0,000252": '<?xml version="1.0"?><DataObject ObjectType="DPUfsImport"><Attribute Name="DICOM_PIXEL_SPACING">'
    '"0,000252" "0,000252"</Attribute></DataObject>',
}


@pytest.mark.parametrize("kind", TEXTS)
def test_numbers_are_read_with_a_decimal_point_or_a_comma(tmp_path, kind):
    software = {"software": {"Aperio": None, "Akoya": "PerkinElmer-QPI", "Philips": "Philips DP v1.0"}[kind.split()[0]]}
    label = (LABEL, {"rowsperstrip": 16, "description": "Macro"})
    path = write(tmp_path / "a.tif", (SMALL, TILE | software | {"description": TEXTS[kind]}), label)
    with Slide.open(path) as slide:
        assert slide.mpp == pytest.approx(0.252) and not slide.warnings


@pytest.mark.parametrize("unit", LENGTHS)
@pytest.mark.parametrize("tool", ["OME", "ImageJ"])
def test_units_are_read_however_they_are_spelt(tmp_path, tool, unit):
    path, factor = tmp_path / "a.tif", LENGTHS[unit] or 1.0
    if tool == "OME":
        stated = "".join(f'PhysicalSize{axis}="{0.252 / factor!r}" PhysicalSize{axis}Unit="{unit}" ' for axis in "XY")
        size = 'SizeX="300" SizeY="200" SizeC="3" SizeZ="1" SizeT="1" DimensionOrder="XYCZT" Type="uint8"'
        text = '<?xml version="1.0" encoding="UTF-8"?><OME><Image ID="Image:0">'
        text += f'<Pixels {stated} ID="Pixels:0" {size}><Channel SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>'
        resolution = {}
    else:
        text, resolution = f"ImageJ=1.53t\nimages=1\nunit={unit}\nloop=false\n", {"resolution": (factor / 0.252,) * 2, "resolutionunit": 1}
    tifffile.imwrite(path, SMALL, photometric="rgb", description=text.encode(), metadata=None, **resolution)
    with Slide.open(path) as slide:
        assert slide.mpp == (pytest.approx(0.252, rel=1e-4) if LENGTHS[unit] else None)


@pytest.mark.parametrize("mpp, warned", [(0.025, True), (0.049, True), (0.06, False), (19.0, False), (25.4, True)])
def test_what_no_light_microscope_has_is_warned_of_unless_it_is_given(tmp_path, mpp, warned):
    path = write(tmp_path / "a.tif", (SMALL, TILE | per_cm(mpp)))
    with Slide.open(path) as slide, Slide.open(path, mpp=mpp) as given:
        assert slide.mpp == pytest.approx(mpp, rel=1e-4) and not given.warnings
        assert [f"no light microscope has {slide.mpp:g}" in text for text in slide.warnings] == [True] * warned
        if mpp > 1:
            with pytest.raises(SlideError, match="give the right one with --overrides" if warned else "use --mpp 19 or larger"):
                slide.extent(64, 0.5)


@pytest.mark.parametrize("y, outcome", [(0.2505, ""), (0.26, "warned"), (0.5, "refused")])
def test_a_resolution_that_differs_across_and_down(tmp_path, y, outcome):
    path = write(tmp_path / "a.tif", (SMALL, TILE | {"resolution": (1e4 / 0.25, 1e4 / y), "resolutionunit": "CENTIMETER"}))
    with Slide.open(path) as slide, Slide.open(path, mpp=0.3) as given:
        assert bool(slide.warnings) == bool(outcome) and given.extent(64, 0.3) == 64
        if outcome == "refused":
            with pytest.raises(SlideError, match=r"says 0.25 µm/px across and 0.5 down; give one with --overrides"):
                slide.extent(64, 1.0)
        else:
            assert slide.extent(64, 1.0) == round(64 / ((0.25 + y) / 2))


@pytest.mark.parametrize("mpp", [0.495, 0.506, 0.52, 0.524, 0.53])
def test_a_scan_of_the_same_magnification_is_enlarged_to_what_is_asked_for(tmp_path, mpp):
    tifffile.imwrite(tmp_path / "a.tif", SMALL, photometric="rgb")
    with Slide.open(tmp_path / "a.tif", mpp=mpp) as slide:
        if mpp > 0.525:
            with pytest.raises(SlideError, match=r"asked for 0.5 µm/px but the scan has 0.53; use --mpp 0.53"):
                slide.extent(100, 0.5)
            return
        extent = slide.extent(100, 0.5)
        assert extent == round(100 * 0.5 / mpp)
        tile = slide.read_tiles(np.array([[40, 30]]), 100, 0.5)[0]
        right = Image.fromarray(SMALL).resize((100, 100), Image.Resampling.BILINEAR, box=(40, 30, 40 + extent, 30 + extent))
        assert np.abs(tile - np.asarray(right).astype(int)).max() <= 1


# -- what is in a file beside the first picture ------------------------------------------------------------------------------------------


def ome_images(path: Path, *images: tuple[np.ndarray, float]) -> Path:
    with tifffile.TiffWriter(path, ome=True) as writer:
        for n, (image, mpp) in enumerate(images):
            size = {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
            writer.write(image, photometric="rgb", tile=(64, 64), compression="deflate", metadata={"Name": f"scan {n}"} | size)
    return path


def test_scanned_regions_lie_side_by_side_the_largest_at_the_left(tmp_path):
    images = [picture(400, 700), picture(800, 600)[::-1], picture(320, 200)[:, ::-1]]
    with Slide.open(scn(tmp_path / "a.scn", *images)) as slide:
        assert slide.regions == [(0, 0, 800, 600), (4096, 0, 4496, 700), (8192, 0, 8512, 200)] and slide.size == (8512, 700)
        assert slide.warnings == ("3 scanned regions, side by side",) and [level.downsample for level in slide.levels] == [1, 4]
        for (left, top, right, bottom), image in zip(slide.regions, (images[1], images[0], images[2])):
            for level, shown in ((0, image), (1, shrunk(image, 4))):
                size = shown.shape[1::-1]
                assert np.abs(slide.read_region((left, top), level, size).astype(int) - shown).mean() < 2.5
            around = slide.read_tiles(np.array([[right - 10, bottom - 10], [left, 0], [right - 20, 0]]), 64, 0.5, threads=2)
            assert (around[0, 11:] == 255).all() and (around[0, :, 11:] == 255).all() and (around[2, :, 21:] == 255).all()
            assert np.array_equal(around[1], slide.read_region((left, 0), 0, (64, 64)))
        rows = np.array([(x, y) for y in range(0, 640, 64) for x in range(0, 8512, 64)])
        assert np.array_equal(slide.read_tiles(rows, 64, 0.5)[::-1], slide.read_tiles(rows[::-1], 64, 0.5))


def test_an_image_of_another_resolution_or_kind_is_no_region_and_is_told(tmp_path):
    image = picture(400, 300)
    with Slide.open(ome_images(tmp_path / "a.ome.tif", (image, 0.5), (image[:200], 2.0), (image[:290], 0.5))) as slide:
        assert len(slide.regions) == 2 and slide.warnings[1:] == ("left out an image of 400 x 200 px",)
    path = write(tmp_path / "b.tif", (image, TILE | per_cm(0.5)), (image[:250], TILE | per_cm(0.5)))
    with Slide.open(path) as slide:
        assert slide.size == (400, 300) and slide.warnings == ("left out an image of 400 x 250 px",)


@pytest.mark.parametrize("overlap", [0, 24])
def test_a_bif_whose_stored_tiles_overlap_is_warned_of(tmp_path, overlap):
    joints = "".join(f'<TileJointInfo Direction="RIGHT" OverlapX="{x}" OverlapY="0"/>' for x in (0, overlap))
    xmp = f"<EncodeInfo><SlideStitchInfo><ImageInfo>{joints}</ImageInfo></SlideStitchInfo></EncodeInfo>".encode()
    with Slide.open(bif(tmp_path / "a.bif", picture(512, 512), stitch=xmp)) as slide:
        assert slide.warnings == ("stored tiles overlap by up to 24 px and are shown side by side: seams show twice",) * (overlap > 0)


@pytest.mark.parametrize("axes", ["ZYXS", "TYXS", "CYXS"])
def test_of_several_planes_one_is_read_and_it_is_said(tmp_path, axes):
    image = picture(300, 200)
    planes, path = np.stack([image, image // 2, image // 3]), tmp_path / "a.ome.tif"
    if axes == "CYXS":  # focal planes of an SVS
        facts = {"description": "Aperio Image Library\r\nx|MPP = 0.5"} | TILE
        path = write(tmp_path / "a.svs", (image, facts), (LABEL, {"rowsperstrip": 16}), (image // 2, facts), (image // 3, facts))
    else:
        tifffile.imwrite(path, planes, photometric="rgb", metadata={"axes": axes})
    with Slide.open(path, mpp=0.5) as slide:
        assert slide.warnings == ("3 focal planes or channels; one is read",)
        check(slide, image)


# -- pixels ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd"])
@pytest.mark.parametrize(
    "layout", [{"rowsperstrip": 50}, {"rowsperstrip": 700}, {"tile": (128, 256)}, {"tile": (128, 256), "planarconfig": "separate"}]
)
def test_lossless_tiff_is_read_exactly(tmp_path, compression, layout, byteorder):
    image = picture(900, 700)
    data = np.moveaxis(image, 2, 0) if "planarconfig" in layout else image
    predictor = compression in ("lzw", "deflate")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, data, photometric="rgb", compression=compression, predictor=predictor, byteorder=byteorder, **layout)
    with Slide.open(path, mpp=0.5) as slide:
        check(slide, image, 0.6)
        assert np.array_equal(slide.read_region((0, 0), 0, slide.size), image)


@pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha", "unspecified", "png"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_what_is_transparent_is_white_and_the_rest_of_an_alpha_channel_is_left_out(tmp_path, planar, alpha):
    image = picture(300, 200)
    data = np.dstack([image, np.full((200, 300), 7, np.uint8)])
    data[:90, :140] = 0  # black, as scanners leave what they did not scan
    path = tmp_path / ("a.png" if alpha == "png" else "a.tif")
    if alpha == "png":
        Image.fromarray(data).save(path)
    else:
        pixels = np.moveaxis(data, 2, 0) if planar == "separate" else data
        tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=[alpha], tile=(128, 128), planarconfig=planar)
    image[:90, :140] = 0 if alpha == "unspecified" else 255
    with Slide.open(path, mpp=1) as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, (300, 200)), image)


def without_adobe_marker(jpeg: bytes) -> bytes:
    """An RGB JPEG as Aperio stores it: component ids 0, 1, 2 and no marker that says RGB."""
    jpeg = re.sub(rb"\xff\xee\x00\x0eAdobe.{7}", b"", jpeg, flags=re.DOTALL)
    frame, scan = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda")
    jpeg = bytearray(jpeg)
    for i in range(3):
        jpeg[frame + 10 + 3 * i] = jpeg[scan + 5 + 2 * i] = i
    return bytes(jpeg)


@pytest.mark.parametrize("kind", ["rgb with marker", "rgb without marker", "jfif that the tag calls rgb", "a blank tile"])
def test_stored_jpeg_streams_have_their_right_colours(tmp_path, kind):
    image = picture(512, 512)
    tiles = [np.ascontiguousarray(image[y : y + 256, x : x + 256]) for y in (0, 256) for x in (0, 256)]
    how = {} if kind == "a blank tile" else {"outcolorspace": "rgb"}
    if kind.startswith("jfif"):
        streams = [simplejpeg.encode_jpeg(t, quality=95) for t in tiles]
        assert streams[0][6:10] == b"JFIF"
    else:
        streams = [imagecodecs.jpeg8_encode(t, level=95, **({"colorspace": "rgb"} | how if how else {})) for t in tiles]
    streams = [without_adobe_marker(s) for s in streams] if "without" in kind else streams
    assert (b"Adobe" in streams[0]) == (kind == "rgb with marker")
    if kind == "a blank tile":  # is white
        streams[1], image[:256, 256:] = b"", 255
    shows(write(tmp_path / "a.tif", (iter(streams), {"shape": image.shape, "dtype": np.uint8, "compressionargs": how} | TILE)), image)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("tile", [(240, 240), (256, 512)])
def test_ycbcr_jpeg_of_every_subsampling(tmp_path, subsampling, tile):
    shows(write(tmp_path / "a.tif", (image := picture(700, 600), {"subsampling": subsampling, "tile": tile})), image)


@pytest.mark.parametrize("compression", [33003, 33005])
def test_jpeg2000_as_ycbcr_and_as_rgb(tmp_path, compression, caplog):
    image = picture(500, 400)
    stored = np.asarray(Image.fromarray(image).convert("YCbCr")) if compression == 33003 else image
    options = {"compression": compression, "tile": (240, 240), "compressionargs": {"level": 90, "codecformat": "j2k", "mct": False}}
    with caplog.at_level("INFO"):
        shows(write(tmp_path / "a.svs", (stored, options)), image)
    assert "JPEG 2000 decodes 9-18 times slower" in caplog.text


def test_jpeg2000_with_subsampled_chroma_is_converted_once(tmp_path):
    stored = Path(__file__).with_name("subsampled_chroma.j2k").read_bytes()  # YCbCr 4:2:2 (studio range), written with ffmpeg
    options = {"shape": (64, 64, 3), "dtype": np.uint8, "compression": 33003, "compressionargs": {}, "tile": (64, 64)}
    tifffile.imwrite(tmp_path / "a.svs", iter([stored]), photometric="rgb", metadata=None, **options)
    with Slide.open(tmp_path / "a.svs", mpp=0.5) as slide:
        tile = slide.read_region((0, 0), 0, (64, 64)).astype(int)
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (220, 220, 220)]
    for (y, x), colour in zip([(16, 16), (16, 48), (48, 16), (48, 48)], colours):
        assert np.abs(tile[y, x] - colour).max() < 20


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_png_and_jpeg_images(tmp_path, name):
    image = picture(600, 500)
    Image.fromarray(image).save(tmp_path / name, **({"quality": 95} if name == "a.jpg" else {}))
    shows(tmp_path / name, image)
    with Slide.open(tmp_path / name) as slide:
        assert slide.vendor == "image" and slide.mpp_source == "none"


# -- what is refused, each in one line -------------------------------------------------------------------------------------------------


def refused(path: Path, message: str) -> None:
    with pytest.raises(SlideError, match=message) as caught:
        Slide.open(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(path.name) and len(str(caught.value)) < 300


GREY, DEEP = np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.uint16)
REFUSED_PIXELS = {
    "grey": (GREY, {"photometric": "minisblack"}, "not RGB; only 8-bit RGB"),
    "channels": (np.zeros((4, 64, 64), np.uint8), {"photometric": "minisblack"}, "not RGB; only 8-bit RGB"),
    "deep": (DEEP, {"photometric": "rgb"}, "16-bit pixels"),
    "deep grey": (DEEP[..., 0], {"photometric": "minisblack"}, "not RGB"),
    "float": (DEEP.astype(np.float32), {"photometric": "rgb"}, "32-bit pixels"),
    "palette": (GREY, {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "PALETTE, not RGB"),
    "cmyk": (np.zeros((64, 64, 4), np.uint8), {"photometric": "separated"}, "not RGB"),
    "webp": (np.zeros((64, 64, 3), np.uint8), {"photometric": "rgb", "compression": "webp"}, "WEBP compression .* convert it"),
    "volume": (np.zeros((16, 64, 64, 3), np.uint8), {"photometric": "rgb", "tile": (16, 64, 64), "volumetric": True}, "a volume"),
}


@pytest.mark.parametrize("kind", [*REFUSED_PIXELS, "L", "P", "I;16", "CMYK"])
def test_other_pixels_are_refused(tmp_path, kind):
    if kind in REFUSED_PIXELS:
        image, options, message = REFUSED_PIXELS[kind]
        tifffile.imwrite(path := tmp_path / "a.tif", image, **options)
    else:
        path, message = tmp_path / ("a.jpg" if kind == "CMYK" else "a.png"), "not an 8-bit RGB image"
        Image.new(kind, (50, 50)).save(path)
    refused(path, message)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.svs", b"", r"an empty file \(0 bytes\)"),
        ("a.svs", b"slide_id,path\n1,x\n" * 50, "a text file"),
        ("a.svs", b"\0" * 4096, "starts with zeros"),
        ("a.svs", bytes(range(255, 0, -1)) * 9, "not a scan of a known format"),
        ("a.dcm", b"\0" * 128 + b"DICM" + b"\0" * 99, "a DICOM file(, which openslide reads| that openslide cannot open)"),
        ("a.svs", b"\0" * 128 + b"DICM" + b"\0" * 99, "a DICOM file"),
        ("a.mrxs", b"\xff\xd8\xff\xe0" + b"\0" * 99, "a MIRAX scan(, which openslide reads| that openslide cannot open)"),
        ("a.vsi", b"II*\0" + b"\0" * 99, "an Olympus VSI scan"),
        ("a.czi", b"ZISRAWFILE" + b"\0" * 99, "a Zeiss CZI file"),
        ("a.svs", b"PK\3\4" + b"\0" * 99, "a ZIP archive"),
        ("a.svs", b"II*\0", "not a readable TIFF"),
        ("a.svs", b"II*\0\x10\0\0\0" + b"\xff" * 99, "not a readable TIFF|a TIFF without images"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0", "the image cannot be decoded"),
        ("a.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "the image cannot be decoded"),
        ("gone.svs", None, r"cannot be opened \(No such file"),
        (".", None, r"cannot be opened \(Is a directory"),
    ],
)
def test_what_is_no_scan_is_named(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, message)
