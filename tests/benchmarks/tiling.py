"""Wall time and peak memory of tiling one slide of 40,000 x 40,000 px, beside other tools. Goals: 1 s, 400 MB, `vs_peer` 2.0.

    python tests/benchmarks/tiling.py [--rounds N] [--json]

Builds an SVS-like slide at 0.25 µm/px (levels 1, 4, 16; pixels of the CMU slide where DRESLCL_TEST_DATA is set, else a drawn texture;
glass on two blocks of five). Every contender runs in a process of its own, which reports wall and CPU time after its imports and its peak
memory; contenders take turns, figures are medians over the rounds.

- ours: coordinates and mask. ours_files: all of `dreslcl tile` (grid, polygons, overlay, slides.csv, contact sheet).
- openslide_loop, the peer: thumbnail by openslide at the same 8 µm/px, median-filtered saturation with Otsu as CLAM and TRIDENT do it, then
  for every grid cell one openslide read at the coarsest level to check that it holds tissue.
- mask_loop: the same, but the check is a Python loop over windows of the mask: no reads.
- lazyslide: find_tissues and tile_tissues, where it is installed (LAZYSLIDE_PYTHON names another interpreter).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
from PIL import Image
from tile_reading import source

EDGE, BLOCK, STORED = 40_000, 4096, 256

START = """
import re, sys, time
from pathlib import Path
path, out = Path(sys.argv[1]), Path(sys.argv[2])
{imports}
start, cpu = time.perf_counter(), time.process_time()
{code}
peak = re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1]  # getrusage would tell the parent's, before exec
print(time.perf_counter() - start, time.process_time() - cpu, int(peak) / 1024, count)
"""
THUMBNAIL = """
slide = openslide.OpenSlide(path)
(w, h), edge = slide.dimensions, 512
thumbnail = np.asarray(slide.get_thumbnail((w // 32, h // 32)).convert("RGB"))
saturation = (ndimage.median_filter(rgb2hsv(thumbnail)[..., 1], 5) * 255).astype(np.uint8)
threshold = threshold_otsu(saturation)
mask = remove_small_objects(ndimage.binary_fill_holes(saturation > threshold), max_size=256)
"""
PEER_IMPORTS = """
import numpy as np, openslide
from scipy import ndimage
from skimage.color import rgb2hsv
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_objects
"""
CONTENDERS = {
    "ours": (
        "from dreslcl.slide import Slide\nfrom dreslcl.tiles import find_tiles",
        """
with Slide.open(path) as slide:
    count = len(find_tiles(slide))
""",
    ),
    "ours_files": ("from dreslcl.tiles import tile_slides", "count = tile_slides(path, out)[0]['tiles']"),
    "openslide_loop": (
        PEER_IMPORTS,
        THUMBNAIL
        + """
count, level = 0, slide.level_count - 1
step = round(edge / slide.level_downsamples[level])
for y in range(0, h - edge + 1, edge):
    for x in range(0, w - edge + 1, edge):
        tile = np.asarray(slide.read_region((x, y), level, (step, step)))[..., :3].astype(np.int16)
        top = tile.max(axis=2)
        count += ((top - tile.min(axis=2)) * 255 > threshold * np.maximum(top, 1)).mean() >= 0.3
""",
    ),
    "mask_loop": (
        PEER_IMPORTS,
        THUMBNAIL
        + """
count = 0
for y in range(0, h - edge + 1, edge):
    for x in range(0, w - edge + 1, edge):
        count += mask[y // 32 : (y + edge) // 32, x // 32 : (x + edge) // 32].mean() >= 0.3
""",
    ),
    "lazyslide": (
        "import lazyslide as zs",
        """
wsi = zs.open_wsi(str(path))
zs.pp.find_tissues(wsi)
zs.pp.tile_tissues(wsi, 256, mpp=0.5)
count = len(wsi.shapes["tiles"])
""",
    ),
}


def build(path: Path) -> None:
    """Write the slide from one block of tissue and one of glass, each encoded once per level."""
    block = Image.fromarray(source()).resize((BLOCK, BLOCK), Image.Resampling.BOX)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for factor in (1, 4, 16):
            pixels = np.asarray(block.resize((BLOCK // factor,) * 2, Image.Resampling.BOX))
            side = len(pixels) // STORED
            cut = [pixels[y * STORED :][:STORED, x * STORED :][:, :STORED] for y in range(side) for x in range(side)]
            tissue = [simplejpeg.encode_jpeg(np.ascontiguousarray(c), 80, colorsubsampling="420") for c in cut]
            glass = simplejpeg.encode_jpeg(np.full((STORED, STORED, 3), 243, np.uint8), 80, colorsubsampling="420")
            edge = EDGE // factor
            cells = range(-(-edge // STORED))
            tiles = (tissue[y % side * side + x % side] if (x // side + 2 * (y // side)) % 5 < 3 else glass for y in cells for x in cells)
            writer.write(
                tiles,
                shape=(edge, edge, 3),
                dtype=np.uint8,
                tile=(STORED, STORED),
                photometric="ycbcr",
                compression="jpeg",
                subsampling=(2, 2),
                description=f"Aperio Image Library dreslcl benchmark\n{edge}x{edge}|AppMag = 40|MPP = 0.25" if factor == 1 else "Aperio",
                metadata=None,
            )
            if factor == 1:  # Aperio's order: baseline, thumbnail in strips, levels
                writer.write(np.asarray(block.resize((512, 512))), photometric="rgb", compression="jpeg", rowsperstrip=16, metadata=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lazy = os.environ.get("LAZYSLIDE_PYTHON") or (sys.executable if find_spec("lazyslide") else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.svs"
        build(path)
        runs: dict[str, list[list[float]]] = {}
        for n in range(options.rounds):
            for name, (imports, code) in CONTENDERS.items():
                python = lazy if name == "lazyslide" else sys.executable
                if python:
                    command = [python, "-c", START.format(imports=imports, code=code), path, Path(folder) / f"{name}{n}"]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    runs.setdefault(name, []).append([float(v) for v in done.stdout.split()[-4:]])
    middle = {name: [statistics.median(column) for column in zip(*values)] for name, values in runs.items()}
    result: dict[str, float | None] = {}
    for name, (wall, cpu, megabytes, count) in middle.items():
        result |= {
            f"{name}_s": round(wall, 3),
            f"{name}_cpu_s": round(cpu, 3),
            f"{name}_rss_mb": round(megabytes),
            f"{name}_tiles": round(count),
        }
    ours = middle["ours"][0]
    result["vs_peer"] = round(middle["openslide_loop"][0] / ours, 2)
    result["vs_mask_loop"] = round(middle["mask_loop"][0] / ours, 2)
    result["vs_lazyslide"] = round(middle["lazyslide"][0] / ours, 2) if "lazyslide" in middle else None
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:22} {value}")


if __name__ == "__main__":
    main()
