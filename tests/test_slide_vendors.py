"""Every layout and colour `Slide` promises. All vendor files here are synthetic: written with tifffile after the format's description."""

import base64
import re
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from dreslcl.common import SlideError
from dreslcl.slide import Slide

JPEG = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (1, 1), "metadata": None}
LABEL = np.full((64, 64, 3), (255, 0, 255), np.uint8)  # nothing of this may ever be read


def picture(width: int, height: int) -> np.ndarray:
    """Smooth, strongly coloured, without symmetry: a wrong colour, place or scale shows. No magenta."""
    y, x = np.mgrid[:height, :width]
    red = 40 + 160 * x / width
    green = 120 + 80 * np.sin(x / 37) * np.cos(y / 53)
    blue = 20 + 140 * y / height
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def shrunk(image: np.ndarray, factor: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).reduce(factor))


def write(path: Path, *pages: tuple[np.ndarray, dict], **kwargs) -> Path:
    with tifffile.TiffWriter(path, **kwargs) as writer:
        for image, options in pages:
            writer.write(image, **{**JPEG, **options})
    return path


def check(slide: Slide, image: np.ndarray, tolerance: float = 2.5) -> None:
    """The whole scan at full and half resolution equals the source picture, and tiles beyond its edge end in white."""
    height, width = image.shape[:2]
    assert slide.size == (width, height)
    whole = slide.read_region((0, 0), (width, height), slide.mpp)
    assert np.abs(whole.astype(int) - image).mean() < tolerance
    half = slide.read_region((0, 0), (width // 2, height // 2), 2 * slide.mpp)
    assert np.abs(half.astype(int) - shrunk(image, 2)[: height // 2, : width // 2]).mean() < tolerance
    corner = slide.read_tiles(np.array([[width - 50, height - 30]]), 100, slide.mpp)[0]
    assert (corner[31:] == 255).all() and (corner[:, 51:] == 255).all()
    assert np.array_equal(corner[:30, :50], whole[-30:, -50:])


def test_svs_with_thumbnail_label_and_macro_shows_only_its_levels(tmp_path):
    image = picture(900, 700)
    facts = {"description": "Aperio Image Library v12\n900x700 (240x240) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990", "tile": (240, 240)}
    path = write(
        tmp_path / "a.svs",
        (image, facts),
        (LABEL, {"rowsperstrip": 16}),
        (shrunk(image, 4), facts),
        (LABEL, {"rowsperstrip": 16, "subfiletype": 1}),
        (LABEL, {"rowsperstrip": 16, "subfiletype": 9}),
    )
    with Slide.open(path) as slide:
        assert (slide.vendor, slide.mpp, slide.mpp_source, slide.objective) == ("aperio", 0.499, "Aperio MPP", 20.0)
        assert [(level.size, level.downsample) for level in slide.levels] == [((900, 700), 1.0), ((225, 175), 4.0)]
        check(slide, image)


def test_svs_whose_scan_is_missing_does_not_show_the_label(tmp_path):
    pages = [(LABEL, {"rowsperstrip": 16, "subfiletype": kind, "description": "Aperio\nlabel 64x64"}) for kind in (1, 9)]
    with pytest.raises(SlideError, match="only label or overview"):
        Slide.open(write(tmp_path / "a.svs", *pages))


def test_ndpi_strips_between_restart_markers_are_read_one_by_one(tmp_path):
    image = picture(512, 640)
    pages = []
    for factor in (1, 2, 4):
        level = shrunk(image, factor)
        jpeg_path = tmp_path / "level.jpg"
        Image.fromarray(level).save(jpeg_path, quality=95, subsampling=0, restart_marker_rows=1)
        jpeg = jpeg_path.read_bytes()
        start = jpeg.index(b"\xff\xda") + 2 + struct.unpack(">H", jpeg[jpeg.index(b"\xff\xda") + 2 :][:2])[0]
        starts = [start] + [m.end() for m in re.finditer(rb"\xff[\xd0-\xd7]", jpeg) if m.start() > start]
        tags = [
            (271, "s", 0, "Hamamatsu", True),
            (65420, "I", 1, 1, True),
            (65421, "f", 1, 40.0 / factor, True),
            (65426, "I", len(starts), starts, True),
        ]
        options = {"shape": level.shape, "dtype": np.uint8, "rowsperstrip": level.shape[0], "extratags": tags}
        pages.append((iter([jpeg]), options | {"resolution": (40000 / factor, 40000 / factor), "resolutionunit": "CENTIMETER"}))
    with Slide.open(write(tmp_path / "a.tif", *pages)) as slide:  # NDPI's tags; its 8-byte offsets only the real file has
        assert (slide.vendor, slide.objective, slide.mpp_source) == ("hamamatsu", 40.0, "TIFF resolution")
        assert slide.mpp == pytest.approx(0.25)
        assert [level.downsample for level in slide.levels] == [1.0, 2.0, 4.0]
        assert slide._stored[0].edge[1] == 8
        check(slide, image)


def test_scn_takes_the_scan_and_not_the_macro(tmp_path):
    image = picture(800, 600)
    dimensions = [(0, 800, 600, 1), (1, 200, 150, 2)]
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="x" sizeX="1" sizeY="1">'
        '<image name="macro"><pixels sizeX="64" sizeY="64"><dimension sizeX="64" sizeY="64" r="0" ifd="0"/></pixels></image>'
        '<image name="image_1"><pixels sizeX="800" sizeY="600">'
        + "".join(f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{i}"/>' for r, w, h, i in dimensions)
        + "</pixels><scanSettings><objectiveSettings><objective>20</objective></objectiveSettings></scanSettings></image>"
        + "</collection></scn>"
    )
    scale = {"tile": (256, 256), "resolutionunit": "CENTIMETER"}
    path = write(
        tmp_path / "a.scn",
        (LABEL, {"tile": (64, 64), "description": xml}),
        (image, scale | {"resolution": (20000, 20000)}),
        (shrunk(image, 4), scale | {"resolution": (5000, 5000)}),
    )
    with Slide.open(path) as slide:
        assert (slide.vendor, slide.mpp, slide.objective) == ("leica", 0.5, 20.0)
        assert [level.downsample for level in slide.levels] == [1.0, 4.0]
        check(slide, image)


def test_philips_levels_lose_their_padding(tmp_path):
    image = picture(1024, 512)
    spacing = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">'
        f'"{0.00025 * f}" "{0.00025 * f}"</Attribute></DataObject>'
        for f in (1, 2, 4)
    )
    xml = f'<?xml version="1.0"?><DataObject ObjectType="DPUfsImport"><Attribute><Array>{spacing}</Array></Attribute></DataObject>'
    padded = [image]
    for factor in (2, 4):
        level = shrunk(image, factor)
        full = np.zeros((-(-level.shape[0] // 512) * 512, -(-level.shape[1] // 512) * 512, 3), np.uint8)
        full[: level.shape[0], : level.shape[1]] = level
        padded.append(full)
    first = {"tile": (512, 512), "software": "Philips DP v1.0", "description": xml}
    macro = (LABEL, {"rowsperstrip": 64, "description": "Macro"})
    path = write(tmp_path / "a.tiff", (padded[0], first), *((p, {"tile": (512, 512)}) for p in padded[1:]), macro)
    with Slide.open(path) as slide:
        assert (slide.vendor, slide.mpp_source) == ("philips", "Philips pixel spacing")
        assert slide.mpp == pytest.approx(0.25)
        assert [(level.size, level.downsample) for level in slide.levels] == [((1024, 512), 1.0), ((512, 256), 2.0), ((256, 128), 4.0)]
        check(slide, image)


def test_ventana_bif_skips_label_and_probability_images(tmp_path):
    image = picture(1000, 800)
    xmp = b'<?xml version="1.0"?><Metadata><iScan Magnification="40" ScanRes="0.2325"/></Metadata>'
    tags = {"extratags": [(700, "B", len(xmp), xmp, True)], "software": "ScanOutputManager 1.1"}
    path = write(
        tmp_path / "a.bif",
        (LABEL, tags | {"tile": (64, 64), "description": "Label Image"}),
        (LABEL, {"tile": (64, 64), "description": "Probability_Image"}),
        (image, {"tile": (256, 256), "description": "level=0 mag=40 quality=95"}),
        (shrunk(image, 2), {"tile": (256, 256), "description": "level=1 mag=20 quality=95"}),
    )
    with Slide.open(path) as slide:
        assert (slide.vendor, slide.mpp, slide.objective) == ("ventana", 0.2325, 40.0)
        assert [level.downsample for level in slide.levels] == [1.0, 2.0]
        check(slide, image)


def test_qptiff_brightfield(tmp_path):
    image = picture(2048, 1024)
    xml = "<PerkinElmer-QPI-ImageDescription><ObjectiveName>20x</ObjectiveName></PerkinElmer-QPI-ImageDescription>"
    first = {
        "tile": (512, 512),
        "software": "PerkinElmer-QPI",
        "description": xml,
        "resolution": (20000, 20000),
        "resolutionunit": "CENTIMETER",
    }
    levels = [(shrunk(image, f), {"tile": (512, 512), "subfiletype": 1}) for f in (2, 4)]
    path = write(tmp_path / "a.qptiff", (image, first), (LABEL, {"rowsperstrip": 16}), *levels, (LABEL, {"rowsperstrip": 16}))
    with Slide.open(path) as slide:
        assert (slide.vendor, slide.mpp, slide.objective) == ("akoya", 0.5, 20.0)
        assert [level.downsample for level in slide.levels] == [1.0, 2.0, 4.0]
        check(slide, image)


@pytest.mark.parametrize("unit, factor", [("µm", 1.0), ("nm", 1000.0), ("mm", 0.001)])
def test_ome_tiff_with_subresolutions(tmp_path, unit, factor):
    image = picture(1024, 768)
    metadata = {"PhysicalSizeX": 0.25 * factor, "PhysicalSizeXUnit": unit, "PhysicalSizeY": 0.26 * factor, "PhysicalSizeYUnit": unit}
    options = {"photometric": "rgb", "tile": (256, 256), "compression": "deflate", "predictor": True}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True, bigtiff=True) as writer:
        writer.write(image, subifds=2, metadata=metadata, **options)
        for f in (2, 4):
            writer.write(shrunk(image, f), subfiletype=1, **options)
    with Slide.open(tmp_path / "a.ome.tif") as slide:
        assert (slide.vendor, slide.mpp_source) == ("ome", "OME PhysicalSize")
        assert slide.mpp_xy == pytest.approx((0.25, 0.26)) and slide.mpp == pytest.approx(0.255)
        assert [level.downsample for level in slide.levels] == [1.0, 2.0, 4.0]
        check(slide, image, 0.6)


@pytest.mark.parametrize("nested", [False, True])
def test_generic_pyramid_as_pages_or_as_subifds(tmp_path, nested):
    image = picture(1100, 900)
    scale = {"tile": (256, 256), "resolution": (50800, 50800), "resolutionunit": "INCH"}
    levels = [(shrunk(image, f), {"tile": (256, 256), "subfiletype": int(nested)}) for f in (2, 4)]
    path = write(tmp_path / "a.tif", (image, scale | ({"subifds": 2} if nested else {})), *levels, bigtiff=True)
    with Slide.open(path) as slide:
        assert (slide.vendor, slide.mpp, slide.mpp_source) == ("generic", 0.5, "TIFF resolution")
        assert [level.downsample for level in slide.levels] == [1.0, 2.0, 4.0]
        check(slide, image)


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
        assert np.array_equal(slide.read_region((0, 0), slide.size, 0.5), image)


def test_an_alpha_channel_is_left_out(tmp_path):
    image = picture(300, 200)
    for planar in ("contig", "separate"):
        data = np.dstack([image, np.full((200, 300), 7, np.uint8)])
        data = np.moveaxis(data, 2, 0) if planar == "separate" else data
        tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", extrasamples=["unassalpha"], tile=(128, 128), planarconfig=planar)
        with Slide.open(tmp_path / "a.tif", mpp=1) as slide:
            assert np.array_equal(slide.read_region((0, 0), (300, 200), 1.0), image)


def without_adobe_marker(jpeg: bytes) -> bytes:
    """An RGB JPEG as Aperio stores it: component ids 0, 1, 2 and no marker that says RGB."""
    jpeg = re.sub(rb"\xff\xee\x00\x0eAdobe.{7}", b"", jpeg, flags=re.DOTALL)
    frame, scan = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda")
    jpeg = bytearray(jpeg)
    for i in range(3):
        jpeg[frame + 10 + 3 * i] = jpeg[scan + 5 + 2 * i] = i
    return bytes(jpeg)


@pytest.mark.parametrize("marker", [True, False])
def test_rgb_jpeg_is_not_taken_for_ycbcr(tmp_path, marker):
    image = picture(512, 512)
    tiles = [image[y : y + 256, x : x + 256] for y in (0, 256) for x in (0, 256)]
    streams = [imagecodecs.jpeg8_encode(np.ascontiguousarray(t), level=95, colorspace="rgb", outcolorspace="rgb") for t in tiles]
    streams = streams if marker else [without_adobe_marker(s) for s in streams]
    assert (b"Adobe" in streams[0]) == marker
    options = {"shape": image.shape, "dtype": np.uint8, "tile": (256, 256), "compressionargs": {"outcolorspace": "rgb"}}
    with Slide.open(write(tmp_path / "a.tif", (iter(streams), options)), mpp=0.5) as slide:
        check(slide, image)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("tile", [(240, 240), (256, 512)])
def test_ycbcr_jpeg_of_every_subsampling(tmp_path, subsampling, tile):
    image = picture(700, 600)
    with Slide.open(write(tmp_path / "a.tif", (image, {"subsampling": subsampling, "tile": tile})), mpp=0.5) as slide:
        check(slide, image)


def test_jfif_tiles_are_ycbcr_whatever_the_photometric_tag_says(tmp_path):
    image = picture(256, 256)
    stream = simplejpeg.encode_jpeg(image, quality=95)
    assert stream[6:10] == b"JFIF"
    options = {"shape": image.shape, "dtype": np.uint8, "tile": (256, 256), "compressionargs": {"outcolorspace": "rgb"}}
    with Slide.open(write(tmp_path / "a.tif", (iter([stream]), options)), mpp=0.5) as slide:
        check(slide, image)


@pytest.mark.parametrize("compression", [33003, 33005])
def test_jpeg2000_as_ycbcr_and_as_rgb(tmp_path, compression, caplog):
    image = picture(500, 400)
    stored = np.asarray(Image.fromarray(image).convert("YCbCr")) if compression == 33003 else image
    options = {"compression": compression, "tile": (240, 240), "compressionargs": {"level": 90, "codecformat": "j2k", "mct": False}}
    with caplog.at_level("INFO"), Slide.open(write(tmp_path / "a.svs", (stored, options)), mpp=0.5) as slide:
        check(slide, image)
    assert "JPEG 2000 decodes 9-18 times slower" in caplog.text


SUBSAMPLED_J2K = base64.b85decode(  # 64 x 64 px, YCbCr 4:2:2 (studio range): red, green, blue and grey quarters; written with ffmpeg
    "|4;u>051Rl0000$0000$00000000000003100031000000000000RdB0S5vB2Lb{AQUDA9000311_A;A0RLP7DI$L$e&BxKexP>ncJOw<ZvbxqZs2E7XHaKoPz6v0P)A"
    "qOSJPKw|6~9V00B&4c4Ia(E-@}KFf#v;015yA0007k00IA#!}$XVlYhbc0RRQH!}$ULW5f9afIgroKVUEe8eav!11EpO`2qk8!}$USNyGF8gYgD|_yYh7{n)Q`ObhVtH"
    "^3hYw;Q1`U&HnUhvEqX>jMliR&xq(7C#HY-^cO`2j&L{<^~1M)*XKU*6#{9dBg4ygYFN2`UQX(YA7)EL<7`slE*@4!O%Y+%dMTKFoA6`bfip?sIV3^T#+s<hS7aP@5Am"
    "0hvE|f@`V~U*G!FQ`}qu|?3Z>V!`4$4heW7S$LJLgxE2T25Ecj3K6p!!FP_g2RP9Fg4%IPdqd|^;!|N7@)+Yny5K44Ndq-yv#8-JH^g8EA{V53B!3e)D{@BPi7hvz%=o"
    "vpT4;@ksl_w-Al>RV%{eQvq4~Nh$1LO=WTt)P19+=Yvsxl+*ug?Igv=a+`_ye@>?;4ibyRQ4g>lKIA8w2GK7uQ1qoE5qbUr%Xt9QnVm8J|&Fbpu(ob4@s`3lx|9a^D%`"
    "avs_Qo;S~+lzjzY!jokFPIX(Q`w2bB6iQUs(wcvT8z>}f8aMNOhRyha%rh|`?uqqxgA~WmQa({II52Y70Oa(*m;(WHMjvJT+5)dp|9?JW2U#i2fkpgH<iF3He0-x}@`f"
    "TA^PHUyLx?y9C8kXDEj^=`0pry`3Q(}#r+G~@K~iqt;$goSm|@{~U&I{1^dMgQ#9sTwh?xTeOW+Y}Gp(%Z_<x?KDCt>_!L6_1F+UJ|KM4#6p@24?LBBShLF0Xi51p2tp"
    "1TKZf29w9<M9WMi-+PI!RT;^Hl9J_eTfe?(P0Gzova>f$^cZf(?7<A^!KGCUpDvu*#"
)


def test_jpeg2000_with_subsampled_chroma_is_converted_once(tmp_path):
    options = {"shape": (64, 64, 3), "dtype": np.uint8, "compression": 33003, "compressionargs": {}, "tile": (64, 64)}
    path = tmp_path / "a.svs"
    tifffile.imwrite(path, iter([SUBSAMPLED_J2K]), photometric="rgb", metadata=None, **options)
    with Slide.open(path, mpp=0.5) as slide:
        tile = slide.read_tiles(np.array([(0, 0)]), 64, 0.5)[0].astype(int)
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (220, 220, 220)]
    for (y, x), colour in zip([(16, 16), (16, 48), (48, 16), (48, 48)], colours):
        assert np.abs(tile[y, x] - colour).max() < 20


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_png_and_jpeg_images(tmp_path, name):
    image = picture(600, 500)
    Image.fromarray(image).save(tmp_path / name, **({"quality": 95} if name == "a.jpg" else {}))
    with Slide.open(tmp_path / name, mpp=0.5) as slide:
        assert slide.vendor == "image" and slide.mpp_source == "given"
        check(slide, image)


def test_blank_stored_tiles_are_white(tmp_path):
    image = picture(512, 512)
    tiles = [image[y : y + 256, x : x + 256] for y in (0, 256) for x in (0, 256)]
    streams = [b"" if i == 1 else imagecodecs.jpeg8_encode(np.ascontiguousarray(t), level=95) for i, t in enumerate(tiles)]
    options = {"shape": image.shape, "dtype": np.uint8, "tile": (256, 256)}
    with Slide.open(write(tmp_path / "a.tif", (iter(streams), options)), mpp=0.5) as slide:
        whole = slide.read_region((0, 0), (512, 512), 0.5)
    assert (whole[:256, 256:] == 255).all() and not (whole[256:] == 255).all(axis=2).any()


def refused_tiffs() -> dict[str, tuple[np.ndarray, dict, str]]:
    grey, deep = np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.uint16)
    return {
        "grey": (grey, {"photometric": "minisblack"}, "not RGB; only 8-bit RGB"),
        "channels": (np.zeros((4, 64, 64), np.uint8), {"photometric": "minisblack"}, "not RGB; only 8-bit RGB"),
        "deep": (deep, {"photometric": "rgb"}, "16-bit pixels"),
        "deep grey": (deep[..., 0], {"photometric": "minisblack"}, "not RGB"),
        "float": (deep.astype(np.float32), {"photometric": "rgb"}, "32-bit pixels"),
        "palette": (grey, {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "palette colours are not read"),
        "cmyk": (np.zeros((64, 64, 4), np.uint8), {"photometric": "separated"}, "not RGB"),
        "webp": (np.zeros((64, 64, 3), np.uint8), {"photometric": "rgb", "compression": "webp"}, "WEBP compression .* convert it"),
        "volume": (np.zeros((16, 64, 64, 3), np.uint8), {"photometric": "rgb", "tile": (16, 64, 64), "volumetric": True}, "a volume"),
    }


@pytest.mark.parametrize("kind", refused_tiffs())
def test_other_pixels_are_refused_in_one_line(tmp_path, kind):
    image, options, message = refused_tiffs()[kind]
    tifffile.imwrite(tmp_path / "a.tif", image, **options)
    with pytest.raises(SlideError, match=message) as caught:
        Slide.open(tmp_path / "a.tif")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("a.tif: ")


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "CMYK"])
def test_other_images_are_refused(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (50, 50)).save(path)
    with pytest.raises(SlideError, match="not an 8-bit RGB image"):
        Slide.open(path)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.svs", b"", r"an empty file \(0 bytes\)"),
        ("a.svs", b"slide_id,path\n1,x\n" * 50, "a text file"),
        ("a.svs", b"\0" * 4096, "starts with zeros"),
        ("a.svs", bytes(range(255, 0, -1)) * 9, "not a scan of a known format"),
        ("a.dcm", b"\0" * 128 + b"DICM" + b"\0" * 99, "a DICOM file, which is not read; convert it"),
        ("a.svs", b"\0" * 128 + b"DICM" + b"\0" * 99, "a DICOM file"),
        ("a.mrxs", b"\xff\xd8\xff\xe0" + b"\0" * 99, "a MIRAX scan, which is not read; convert it"),
        ("a.vsi", b"II*\0" + b"\0" * 99, "an Olympus VSI scan"),
        ("a.czi", b"ZISRAWFILE" + b"\0" * 99, "a Zeiss CZI file"),
        ("a.svs", b"PK\3\4" + b"\0" * 99, "a ZIP archive"),
        ("a.svs", b"II*\0", "not a readable TIFF"),
        ("a.svs", b"II*\0\x10\0\0\0" + b"\xff" * 99, "not a readable TIFF|a TIFF without images"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0", "the image cannot be decoded"),
        ("a.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "the image cannot be decoded"),
    ],
)
def test_what_is_no_scan_is_named_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SlideError, match=message) as caught:
        Slide.open(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(SlideError, match=r"cannot be opened \(No such file"):
        Slide.open(tmp_path / "gone.svs")
    with pytest.raises(SlideError, match=r"cannot be opened \(Is a directory"):
        Slide.open(tmp_path)
