"""DRESLCL: tile and text encoder, residual aggregator and heads in one module; its loss; its folder on disk."""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .cohort import Cohort, TileReader, prefetch
from .common import ConfigError, DreslclError, ModelError, SlideError, fingerprint, progress, write_bytes, write_json
from .config import EncoderConfig, ModelConfig, TileConfig
from .encoder import Encoder
from .formats import read_features
from .residual import ResidualAggregator, encode_residuals
from .slide import Slide
from .tiles import find_tiles

log = logging.getLogger(__name__)

VERSION = 1
CHUNK = 512  # tiles read and encoded at a time when a slide is streamed
Precision = Literal["auto", "fp32", "bf16"]


class DRESLCL(nn.Module):
    """The whole model.

    Attributes:
        encoder: tile and text towers; None where tile features and report vectors came from elsewhere.
        aggregator: residual sums (B, K, D), counts (B, K) -> z (B, E), unit norm.
        text_head: frozen report vectors -> joint space; None where the text tower learns, its vectors being u themselves.
        logit_scale: log of the inverse temperature, learnt.
        about: what else the model's folder tells: tile size and resolution, slides seen in pretraining.
    """

    text_centre: torch.Tensor

    def __init__(
        self,
        encoder: Encoder | None,
        config: ModelConfig,
        *,
        dim: int,
        text_dim: int,
        frozen_text: bool,
        temperature: float = 0.07,
        about: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.config, self.dim, self.text_dim, self.frozen_text = config, dim, text_dim, frozen_text
        self.about = about or {}
        self.encoder = encoder
        self.aggregator = ResidualAggregator(dim, self.joint_dim, config)
        self.text_head = nn.Linear(text_dim, self.joint_dim, bias=False) if frozen_text else None
        self.register_buffer("text_centre", torch.zeros(text_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # SigLIP only (Zhai et al. 2023, start value)

    @property
    def joint_dim(self) -> int:
        """E."""
        return self.config.joint_dim if self.frozen_text else self.text_dim

    def head_parameters(self) -> list[nn.Parameter]:
        """Everything that learns except the two towers."""
        return [p for n, p in self.named_parameters() if not n.startswith("encoder.")]

    def project_text(self, vectors: Float[Tensor, "B X"]) -> Float[Tensor, "B E"]:
        """Report vectors -> u, unit norm. Frozen vectors crowd in a narrow cone: centred on the training reports' mean first."""
        if self.text_head is None:
            return F.normalize(vectors, dim=-1)
        return F.normalize(self.text_head(vectors - self.text_centre), dim=-1)

    # use after training

    @torch.no_grad()
    def embed_tiles(self, tiles: np.ndarray) -> Float32[np.ndarray, "N D"]:
        """Unit-norm features of tiles, uint8 (N, H, W, 3).

        Raises:
            ModelError: the model has no tile encoder (it was trained on features).
        """
        return self._towers().encode_tiles(torch.from_numpy(tiles).to(self.text_centre.device)).cpu().numpy()

    @torch.no_grad()
    def embed_features(self, parts: Iterable[Float[np.ndarray, "_ D"]]) -> Float32[np.ndarray, "E"]:
        """The slide vector of a slide's tile features, given in parts; rounded to float16 as in the bank, so both give the same.

        Raises:
            ModelError: features of another width than the model's D.
        """
        was_training = self.training
        self.eval()
        total = None
        for part in parts:
            if part.shape[1] != self.dim:
                raise ModelError(
                    f"features have width {part.shape[1]}, the model was trained on width {self.dim}; use the same tile encoder"
                )
            rows = torch.from_numpy(part.astype(np.float16)).to(self.text_centre.device).float()
            new = encode_residuals(rows, self.aggregator.codewords, self.config.soft_assignment)
            total = new if total is None else (total[0] + new[0], total[1] + new[1])
        assert total is not None, "a slide without tiles has no vector"
        vector = self.aggregator(total[0][None], total[1][None])[0].cpu().numpy()
        self.train(was_training)
        return vector

    def embed_slide(self, scan: str | Path, *, batch: int = 128) -> Float32[np.ndarray, "E"]:
        """The slide vector of a scan: its tissue tiles, all encoded. Nothing is written, memory does not grow with the scan.

        Raises:
            ModelError: the model has no tile encoder (it was trained on features).
            SlideError: the scan cannot be read, or holds no tissue.
        """
        self._towers()
        with Slide.open(Path(scan)) as slide:
            grid = find_tiles(slide, TileConfig(size=self.about["size"], mpp=self.about["mpp"]))
            if not len(grid):
                raise SlideError(f"{scan}: no tissue found, so there is nothing to embed")
            with inference(self):
                corners = (grid.xy[i : i + batch] for i in range(0, len(grid), batch))
                return self.embed_features(self.embed_tiles(slide.read_tiles(xy, grid.size, grid.mpp)) for xy in corners)

    @torch.no_grad()
    def embed_text(self, texts: str | Sequence[str]) -> Float32[np.ndarray, "*N E"]:
        """Joint-space vector of a text, or of each of several.

        Raises:
            ModelError: the model has no text tower that its joint space knows.
        """
        if self.about.get("text") == "vectors":
            raise ModelError("this model was trained on report vectors made elsewhere: encode texts with that tool, then `project_text`")
        many = [texts] if isinstance(texts, str) else list(texts)
        vectors = self.project_text(self._towers().encode_reports(many)).cpu().numpy()
        return vectors[0] if isinstance(texts, str) else vectors

    def _towers(self) -> Encoder:
        if self.encoder is None:
            raise ModelError("this model has no encoder of its own: it was trained on features made elsewhere")
        return self.encoder

    # the folder

    def fingerprint(self) -> str:
        """Hash of all that an embedding depends on (16 hex digits)."""
        own = {k: v.detach().cpu().double().sum().item() for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        return fingerprint(own, self.encoder.fingerprint() if self.encoder else None)

    def save(self, folder: Path) -> None:
        """Write config.json, weights.safetensors and, with an encoder, the OpenCLIP folder open_clip/.

        The configuration goes first and comes last: between the two the folder is no model, never a mix of an older and this one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        if self.encoder is not None:
            self.encoder.save(folder / "open_clip")
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        write_bytes(folder / "weights.safetensors", save(weights))
        header = {
            "version": VERSION,
            "model": asdict(self.config),
            "dim": self.dim,
            "text_dim": self.text_dim,
            "frozen_text": self.frozen_text,
            "encoder": self.encoder is not None,
            "about": self.about,
        }
        write_json(folder / "config.json", header)

    @classmethod
    def load(cls, folder: Path) -> "DRESLCL":
        """Read a model folder, in evaluation mode, on the CPU.

        Raises:
            ModelError: no model there, a damaged or newer one, or weights that do not fit its configuration.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if header["version"] > VERSION:
                raise ModelError(f"{folder}: version {header['version']} is newer than this dreslcl reads ({VERSION})")
            encoder = Encoder.create(EncoderConfig(name=f"local-dir:{folder / 'open_clip'}")) if header["encoder"] else None
            model = cls(
                encoder,
                ModelConfig(**header["model"]),
                dim=header["dim"],
                text_dim=header["text_dim"],
                frozen_text=header["frozen_text"],
                about=header["about"],
            )
            missing, extra = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, ConfigError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{folder}: not a whole dreslcl model folder ({reason}); give RUN/model of a finished pretrain") from error
        if extra or any(not k.startswith("encoder.") for k in missing):
            raise ModelError(f"{folder}: weights.safetensors does not fit config.json; was one of them replaced?")
        return model.eval()


def contrastive_loss(
    z: Float[Tensor, "B E"],
    u: Float[Tensor, "B E"],
    reports: Int[Tensor, "B"],
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (Radford et al. 2021), or with `bias` the pairwise sigmoid loss SigLIP (Zhai et al. 2023).

    Slides with the same report number are positives of each other; without such pairs the value equals OpenCLIP's
    ClipLoss and SigLipLoss. `scale` is the inverse temperature.
    """
    logits = scale * z @ u.T
    same = (reports[:, None] == reports).to(logits.dtype)
    if bias is not None:
        return -F.logsigmoid((2 * same - 1) * (logits + bias)).sum() / len(z)
    target = same / same.sum(1, keepdim=True)
    target = (1 - label_smoothing) * target + label_smoothing / len(z)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2  # target is symmetric


def pick_device() -> torch.device:
    """The GPU of this rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 arithmetic for the towers where asked for, or by `auto` on a GPU that has it."""
    wanted = precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient, and back."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def encode_members(
    encoder: Encoder | None,
    cohort: Cohort,
    members: Sequence[int],
    *,
    batch: int,
    precision: Precision,
    workers: int,
    title: str,
    reader: TileReader | None = None,
) -> Iterator[tuple[int, Iterator[Float[np.ndarray, "n D"]]]]:
    """Features of all tiles of the members in turn: (member, its parts in row order). Take each member's parts before the next.

    Tiles are read ahead of the encoder, across members; a cohort of features is read from its files. A member that cannot be read
    raises its error where its parts are taken; the members after it come all the same.
    """
    if cohort.work is None:
        with progress(title, len(members), "slides") as bar:
            for m in members:
                yield m, map(read_features, [cohort.members[m].source])
                bar.advance(bar.task_ids[0])
        return
    assert encoder is not None, "pixels need a tile encoder"
    device, reader = encoder.mean.device, reader or TileReader(cohort, workers=workers)
    jobs = [(m, np.arange(i, min(i + CHUNK, cohort.members[m].tiles))) for m in members for i in range(0, cohort.members[m].tiles, CHUNK)]
    bad: dict[int, Exception] = {}

    def read(job: tuple[int, np.ndarray]) -> np.ndarray | None:
        try:
            return None if job[0] in bad else reader.read(*job)
        except (DreslclError, OSError, MemoryError) as error:
            bad[job[0]] = error
            return None

    def parts() -> Iterator[tuple[int, np.ndarray | None]]:
        with progress(title, sum(len(index) for _, index in jobs), "tiles") as bar:
            for (member, index), tiles in zip(jobs, prefetch(read, jobs, reader.workers, ahead=2 * reader.workers)):
                bar.advance(bar.task_ids[0], len(index))
                if tiles is None:
                    yield member, None
                    continue
                with inference(encoder), autocast(device, precision):
                    done = [
                        encoder.encode_tiles(torch.from_numpy(tiles[i : i + batch]).to(device)).cpu() for i in range(0, len(tiles), batch)
                    ]
                yield member, torch.cat(done).numpy()

    def checked(member: int, group: Iterable[tuple[int, np.ndarray | None]]) -> Iterator[np.ndarray]:
        for _, features in group:
            if features is None:
                raise bad[member]
            yield features

    for member, group in groupby(parts(), key=itemgetter(0)):
        yield member, checked(member, group)
