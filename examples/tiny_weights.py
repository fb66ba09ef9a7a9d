"""The weights of `dreslcl-tiny` that the demo starts from: its image tower learns to tell drawn fields of tissue apart.

    python examples/tiny_weights.py WORK dreslcl/dreslcl-tiny.safetensors

WORK gets drawn cohorts of seeds 1000, 1001, ..., none of which a demo draws by itself. A tile's class is what its field was drawn as:
stroma, lymphocytes, alveoli or tumour; which tumour it is, and its mutation, are left for the demo to learn from reports. Nothing here is
real tissue: the weights make the demo short and steady, and are no start for real slides.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from dreslcl.common import read_table, write_bytes
from dreslcl.config import EncoderConfig
from dreslcl.demo import BACKGROUND, TILES, write_cohort
from dreslcl.encoder import Augmentation, Encoder
from dreslcl.tiles import TileGrid, tile_slides

ORDER = {kind: n for n, kind in enumerate(BACKGROUND)}  # all others are tumour


def tiles_of(work: Path, seed: int, slides: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and kinds of the tiles of one drawn cohort."""
    folder, pixels, kinds = work / str(seed), [], []
    if not (folder / "cells.csv").exists():
        write_cohort(folder, slides, seed)
    tile_slides(folder / "slides", folder / "work", TILES)
    kind = {(r["slide_id"], int(r["x"]), int(r["y"])): ORDER.get(r["kind"], len(ORDER)) for r in read_table(folder / "cells.csv")}
    for file in sorted((folder / "work" / "tiles").glob("*.h5")):
        grid = TileGrid.load(file)
        known = [(grid.slide_id, *corner) in kind for corner in grid.xy.tolist()]
        with grid.open_scan(folder / "slides" / f"{grid.slide_id}.svs") as scan:
            pixels.append(scan.read_tiles(grid.xy[known], grid.size, grid.mpp))
        kinds += [kind[grid.slide_id, *corner] for corner in grid.xy[known].tolist()]
    return np.concatenate(pixels), np.array(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    for flag, default in {"--cohorts": 4, "--slides": 120, "--epochs": 3, "--batch": 128}.items():
        parser.add_argument(flag, type=int, default=default)
    options = parser.parse_args()
    parts = [tiles_of(options.work, 1000 + n, options.slides) for n in range(options.cohorts)]
    pixels, kinds = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts))
    torch.manual_seed(0)
    encoder, head = Encoder.create(EncoderConfig()), nn.Linear(128, len(ORDER) + 1)
    optimizer = torch.optim.AdamW([*encoder.tower_parameters(), *head.parameters()], weight_decay=0.05)
    steps, random = options.epochs * (len(pixels) // options.batch), torch.Generator().manual_seed(0)
    rates = [2e-3 * min(1, 10 * (s + 1) / steps) * (1 + math.cos(math.pi * s / steps)) / 2 for s in range(steps)]
    for epoch in range(options.epochs):
        right = 0
        for some in torch.randperm(len(pixels), generator=random).split(options.batch)[: len(pixels) // options.batch]:
            found = head(encoder.encode_tiles(pixels[some], Augmentation.draw(len(some), random, 0.4)) * 10)
            loss = F.cross_entropy(found, kinds[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = rates.pop(0)
            optimizer.step()
            right += int((found.argmax(1) == kinds[some]).sum())
        print(f"epoch {epoch + 1}: {right / len(pixels):.3f} of {len(pixels)} tiles told right", flush=True)
    write_bytes(options.out, save({k: v.half().contiguous() for k, v in encoder.clip.visual.state_dict().items()}))


if __name__ == "__main__":
    main()
