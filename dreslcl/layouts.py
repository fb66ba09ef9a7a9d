"""Files that TRIDENT, CLAM, STAMP and Patho-Bench read, written from their formats; none of those packages is needed.

Tile features come with the grid they were made on, slide vectors with the ids they stand for.
"""

import io
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from . import __version__
from .errors import ConfigError
from .files import check_id, hdf5_file, write_bytes, write_table
from .grid import TileGrid

Layout = Literal["trident", "clam", "stamp", "patho-bench"]
Features = Float32[np.ndarray, "M D"]


def tile_files(out: Path, layout: Layout, slide: str) -> list[Path]:
    """The files in which `write_tiles` puts a slide's tile features.

    Raises:
        ConfigError: the tool has no files of tile features.
    """
    folders = {
        "trident": [("tile_features", "h5")],
        "clam": [("clam/pt_files", "pt"), ("clam/h5_files", "h5")],
        "stamp": [("stamp_tiles", "h5")],
    }
    if layout not in folders:
        raise ConfigError(f"{layout} reads no tile features of its own; use --layout trident with --tile-features")
    return [out / folder / f"{slide}.{suffix}" for folder, suffix in folders[layout]]


def write_tiles(out: Path, layout: Layout, features: Features, grid: TileGrid, encoder: str) -> None:
    """Write the tile features of one slide: TRIDENT's h5, CLAM's h5 and pt, or STAMP's h5 (float16, places in µm)."""
    *tensor, path = tile_files(out, layout, grid.slide_id)
    for file in tensor:
        import torch

        memory = io.BytesIO()
        torch.save(torch.from_numpy(features), memory)
        write_bytes(file, memory.getbuffer())
    with hdf5_file(path) as file:
        if layout == "stamp":
            file["feats"] = features.astype(np.float16)
            file["coords"] = (grid.xy * grid.mpp_level0).astype(np.float32)
            file.attrs.update(extractor=encoder, unit="um", tile_size_um=grid.size * grid.mpp, tile_size_px=grid.size)
            file.attrs.update(feat_type="tile", code_hash=f"dreslcl {__version__}")  # no stamp_version: STAMP refuses newer ones
            return
        file["features"] = features
        file["coords"] = grid.xy.astype(np.int32 if layout == "clam" else np.int64)
        file["features"].attrs.update(name=grid.slide_id, savetodir=path.parent.name, encoder=encoder)
        grid.describe(file["coords"], path.parent.name)


def write_vectors(
    out: Path, layout: Layout, ids: tuple[str, ...], patients: tuple[str, ...], vectors: Float32[np.ndarray, "S E"], model: str
) -> None:
    """Write one file per slide (or per patient, where ids are patients) as STAMP or Patho-Bench read them, and STAMP's slide table.

    TRIDENT's slide features are what `embed` writes anyway; CLAM reads none.

    Raises:
        TableError: an id (a patient's, from a table) that cannot name a file.
    """
    if layout not in ("stamp", "patho-bench"):
        return
    kind = "patient" if ids == patients else "slide"
    for name, vector in zip(ids, vectors):
        check_id(name, str(out))
        folder = out / ("stamp_slides" if layout == "stamp" else "patho_bench")
        with hdf5_file(folder / f"{name}.h5") as file:
            if layout == "stamp":
                file["feats"] = vector[None]
                file.attrs.update(feat_type=kind, encoder=f"dreslcl {model}", precision="float32")
            else:
                file["features"] = vector
    if layout == "stamp":
        write_table(out / "stamp_slides.csv", ("PATIENT", "FILENAME"), [(p, f"{s}.h5") for s, p in zip(ids, patients)])
