"""OpenCLIP's towers as dreslcl uses them: tiles -> unit-norm features, reports -> unit-norm text vectors.

Tiles arrive as uint8 batches; resizing and normalisation follow the model's own preprocessing configuration and run on
the device, in batch. A report longer than the text tower's context is read in overlapping windows.
"""

import difflib
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import save
from torch import Tensor, nn

from .common import ModelError, write_bytes, write_json
from .config import EncoderConfig

log = logging.getLogger(__name__)

TINY = "dreslcl-tiny"
CPU_PIXELS = 1 << 18  # in one pass; with more, a CPU waits for memory: EfficientNet-Lite0 at 128 px fell to a quarter of its speed
_SCHEMAS = ("hf-hub:", "local-dir:")
_BLOCKS = re.compile(r"(transformer\.resblocks|trunk\.(blocks|stages|layers))$")
_AFTER_BLOCKS = re.compile(r"(trunk\.)?(proj|ln_post|norm|fc_norm|head|attn_?pool|final_conv|conv_head)\b")


@dataclass(frozen=True)
class Augmentation:
    """One random view of each of N tiles: quarter turns and flips, and a factor on each colour's optical density."""

    turns: Tensor
    """(N,) int64, 0-7: quarter turns, plus a flip from 4 on."""
    stain: Tensor
    """(N, 3) float32, factor on the optical density of red, green and blue."""

    @classmethod
    def draw(cls, tiles: int, generator: torch.Generator, jitter: float) -> "Augmentation":
        """Draw views for `tiles` tiles; densities vary by ±`jitter`."""
        turns = torch.randint(0, 8, (tiles,), generator=generator)
        stain = 1 + jitter * (2 * torch.rand((tiles, 3), generator=generator) - 1)
        return cls(turns, stain)

    def part(self, start: int, stop: int) -> "Augmentation":
        """The views of tiles start to stop - 1."""
        return Augmentation(self.turns[start:stop], self.stain[start:stop])

    def __call__(self, images: Float[Tensor, "N 3 h w"]) -> Float[Tensor, "N 3 h w"]:
        """Apply to images with values from 0 to 1."""
        # Beer-Lambert: scaling the optical density -log(I) by s is I ** s
        images = images.clamp_min(1 / 256) ** self.stain.to(images.device)[:, :, None, None]
        out = torch.empty_like(images)
        for turn in range(8):
            which = (self.turns == turn).nonzero()[:, 0].to(images.device)
            if len(which):
                view = torch.rot90(images[which], turn % 4, (2, 3))
                out[which] = view.flip(3) if turn >= 4 else view
        return out


class Encoder(nn.Module):
    """An OpenCLIP model as tile and text encoder. Make one with `Encoder.create`.

    Attributes:
        dim: D, width of a tile feature.
        text_dim: width of a text vector (the same joint space in OpenCLIP, so equal to D).
        pretrained: whether weights were loaded (else they are random).
    """

    clip: Any  # OpenCLIP's towers share no base class that names their parts
    mean: Tensor
    std: Tensor

    def __init__(self, clip: nn.Module, tokenizer: Any, model_cfg: dict[str, Any], name: str, pretrained: bool):
        super().__init__()
        self.clip, self.tokenizer, self.model_cfg, self.name, self.pretrained = clip, tokenizer, model_cfg, name, pretrained
        visual = self.clip.visual
        size = visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.preprocess_cfg: dict[str, Any] = dict(visual.preprocess_cfg)
        self.dim = self.text_dim = int(model_cfg["embed_dim"])
        self.context: int = tokenizer.context_length
        self.register_buffer("mean", torch.tensor(visual.image_mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(visual.image_std)[:, None, None], persistent=False)

    @classmethod
    def create(cls, config: EncoderConfig, *, seed: int = 0) -> "Encoder":
        """Build the model that `config` names; random weights are drawn from `seed`.

        Raises:
            ModelError: unknown name or tag (near names are suggested), a folder without a configuration or with damaged
                weights, or a download that failed (with what to do offline).
        """
        name = config.name
        _register_tiny()
        _check_name(config)
        pretrained = bool(config.pretrained) or name.startswith(_SCHEMAS)
        with torch.random.fork_rng(devices=[]), _quiet_open_clip():
            torch.manual_seed(seed)
            try:
                model_cfg = open_clip.get_model_config(name)
                tag = open_clip.get_pretrained_cfg(name, config.pretrained) if config.pretrained else {}
                if tag.get("quick_gelu"):  # OpenCLIP only warns where a name and a tag differ in their activation
                    model_cfg["quick_gelu"] = True
                clip = open_clip.create_model(
                    name,
                    config.pretrained,
                    force_quick_gelu=model_cfg.get("quick_gelu", False),
                    require_pretrained=pretrained,
                    pretrained_text=False,
                )
                tokenizer = open_clip.get_tokenizer(name)
            except Exception as error:  # OpenCLIP raises many types for the same few user mistakes
                raise ModelError(_explain(config, error)) from error
        clip.visual.to(memory_format=torch.channels_last)  # convolutions on a CPU: 1.2 to 2 times as fast; no effect on others
        return cls(clip, tokenizer, model_cfg, name, pretrained)

    # tiles

    def preprocess(self, tiles: UInt8[Tensor, "N H W 3"]) -> Float[Tensor, "N 3 h w"]:
        """Resize and crop to the tower's input as OpenCLIP's inference transform does; values from 0 to 1."""
        images = tiles.permute(0, 3, 1, 2)
        (h, w), (height, width) = self.image_size, images.shape[2:]
        if (height, width) != (h, w):
            longest = self.preprocess_cfg["resize_mode"] == "longest"
            if self.preprocess_cfg["resize_mode"] == "squash":
                new = (h, w)
            else:
                scale = min(h / height, w / width) if longest else max(h / height, w / width)
                # OpenCLIP rounds the longest edge's partner, torchvision cuts the shortest's
                new_h, new_w = (round(n * scale) if longest else int(n * scale + 1e-6) for n in (height, width))
                new = (new_h, new_w)
            mode = "bilinear" if self.preprocess_cfg["interpolation"] == "bilinear" else "bicubic"
            source = images if images.device.type == "cpu" else images.float()  # uint8 resizing exists on the CPU only
            resized = F.interpolate(source, new, mode=mode, antialias=True)
            images = resized.float().round_().clamp_(0, 255)  # OpenCLIP resizes 8-bit pictures, so values are whole
            middle = int if longest else round
            top, left = middle((new[0] - h) / 2), middle((new[1] - w) / 2)  # negative padding crops
            images = F.pad(images, (-left, left + w - new[1], -top, top + h - new[0]), value=self.preprocess_cfg["fill_color"])
        return images.float() / 255

    def encode_tiles(self, tiles: UInt8[Tensor, "N H W 3"], views: Augmentation | None = None) -> Float[Tensor, "N D"]:
        """Unit-norm features of tiles, float32; with `views`, of an augmented view of each. A CPU takes them a few at a time."""
        h, w = self.image_size
        step = max(1, len(tiles) if tiles.is_cuda else CPU_PIXELS // (h * w))
        parts = []
        for i in range(0, max(1, len(tiles)), step):
            images = self.preprocess(tiles[i : i + step])
            if views is not None:
                images = views.part(i, i + step)(images)
            images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
            parts.append(F.normalize(self.clip.encode_image(images).float(), dim=-1))
        return torch.cat(parts)

    # reports

    def split_report(self, report: str, *, sentences: bool = False) -> list[str]:
        """The pieces of a cleaned report that the text tower reads one by one.

        Windows of at most the tower's context, each sharing a quarter with the one before; with `sentences`, one piece
        per sentence (a sentence longer than the context in windows). Never empty.
        """
        report = clean_report(report)
        parts = [p for p in re.split(r"(?<=[.!?;])\s+", report) if p] if sentences else [report]
        return [window for part in parts for window in self._windows(part)] or [""]

    def _windows(self, text: str) -> list[str]:
        words = text.split()
        counts = [max(1, len(self._tokens(word))) for word in words]
        room = self.context - 2  # the start and end tokens
        windows, start = [], 0
        while start < len(words):
            stop, used = start, 0
            while stop < len(words) and (used + counts[stop] <= room or stop == start):
                used += counts[stop]
                stop += 1
            windows.append(" ".join(words[start:stop]))
            if stop == len(words):
                break
            start = max(start + 1, stop - (stop - start) // 4)
        return windows

    def _tokens(self, text: str) -> list[int]:
        inner = getattr(self.tokenizer, "tokenizer", None)  # an HF tokenizer keeps its own inside
        return self.tokenizer.encode(text) if inner is None else inner.encode(text, add_special_tokens=False)

    def encode_texts(self, texts: Sequence[str], *, batch: int = 64) -> Float[Tensor, "N E"]:
        """Unit-norm vectors of short texts (each at most one window), float32."""
        device = self.mean.device
        parts = [self.clip.encode_text(self.tokenizer(list(texts[i : i + batch])).to(device)) for i in range(0, len(texts), batch)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def encode_reports(self, reports: Sequence[str]) -> Float[Tensor, "N E"]:
        """Vector of each whole report: the mean of its windows' unit-norm vectors, as in training."""
        pieces = [self.split_report(report) for report in reports]
        vectors = self.encode_texts([p for report in pieces for p in report])
        return torch.stack([part.mean(0) for part in vectors.split([len(report) for report in pieces])])

    # weights

    def tower_parameters(self) -> list[nn.Parameter]:
        """Parameters of the image tower."""
        return list(self.clip.visual.parameters())

    def text_parameters(self) -> list[nn.Parameter]:
        """Parameters of the text tower (OpenCLIP's own logit scale and bias left out: dreslcl has its own)."""
        own = {id(p) for p in self.clip.visual.parameters()}
        return [p for n, p in self.clip.named_parameters() if id(p) not in own and n not in ("logit_scale", "logit_bias")]

    def set_trainable(self, tune: str, *, text: bool) -> None:
        """Choose what learns: `tune` is EncoderConfig.tune, `text` the text tower.

        Raises:
            ModelError: the tower has no blocks to count for last:N, or no projection for head.
        """
        for p in self.clip.parameters():
            p.requires_grad_(False)
        for p in self.text_parameters():
            p.requires_grad_(text)
        visual = self.clip.visual
        tail = {n: p for n, p in visual.named_parameters() if _AFTER_BLOCKS.match(n)}
        chosen = {"all": list(visual.parameters()), "none": []}.get(tune, list(tail.values()))
        if tune.startswith("last:"):
            towers = [m for n, m in visual.named_modules() if _BLOCKS.match(n)]
            if not towers:
                raise ModelError(f"{self.name}: cannot tell the tower's blocks apart; use --tune all, head or none")
            last = int(tune[5:])
            chosen += [p for block in list(towers[0].children())[-last:] * (last > 0) for p in block.parameters()]
        if not chosen and tune != "none":
            raise ModelError(f"{self.name}: cannot tell the tower's last projection; use --tune all or none")
        for p in chosen:
            p.requires_grad_(True)

    def set_execution(self, *, checkpointing: bool = False, compile: bool = False) -> None:
        """Choose how the towers compute; results stay, up to rounding. For the meaning see TrainConfig.

        Raises:
            ModelError: the image tower offers no activation checkpointing, or cannot be compiled here.
        """
        visual = self.clip.visual
        if checkpointing:
            with _quiet_open_clip():
                self.clip.set_grad_checkpointing(True)
            if not any(getattr(m, "grad_checkpointing", False) for m in visual.modules()):  # OpenCLIP passes over a tower that has none
                raise ModelError(f"{self.name}: the image tower offers no activation checkpointing; lower --tile-batch instead")
        if compile:
            visual.compile()
            try:
                self.encode_tiles(torch.zeros((2, *self.image_size, 3), dtype=torch.uint8, device=self.mean.device))
            except Exception as error:  # many types: no C++ compiler, an operation that the compiler does not know
                reason = str(error).strip().splitlines()[0][:200]
                raise ModelError(f"{self.name}: cannot be compiled here ({reason}); leave --compile out") from error

    def train(self, mode: bool = True) -> "Encoder":
        """As nn.Module.train, but batch norm keeps its statistics: bank rows and fresh features must agree."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def fingerprint(self) -> str:
        """Hash of the image tower's architecture, weights and preprocessing (16 hex digits): what a tile feature depends on."""
        architecture = {k: v for k, v in self.model_cfg.items() if k != "text_cfg"}
        digest = hashlib.sha256(json.dumps([architecture, self.preprocess_cfg], sort_keys=True, default=str).encode())
        for key, value in sorted(self.clip.visual.state_dict().items()):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(value.detach().cpu().reshape(-1).float().numpy()).data)
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write a folder that `open_clip.create_model_from_pretrained("local-dir:...")` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in self.clip.state_dict().items()}
        write_bytes(folder / "open_clip_model.safetensors", save(weights))
        if hasattr(self.tokenizer, "tokenizer"):
            self.tokenizer.save_pretrained(folder)
        preprocess = {k: v for k, v in self.preprocess_cfg.items() if k != "size"}  # the architecture says the size
        write_json(folder / "open_clip_config.json", {"model_cfg": self.model_cfg, "preprocess_cfg": preprocess})


def clean_report(text: str) -> str:
    """Mend what optical character recognition leaves: split words, control characters, rows of dots and dashes."""
    text = re.sub(r"(\w)-\s*\n\s*(\w)", r"\1\2", text)
    text = re.sub(r"[^\w\s.,;:()/%<>=+\-'\"°µ&#?!]", " ", text)
    text = re.sub(r"([._\-=*])\1{2,}", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def _register_tiny() -> None:
    if TINY not in open_clip.list_models():
        open_clip.add_model_config(Path(__file__).with_name(f"{TINY}.json"))


def list_encoders() -> list[str]:
    """Names of all OpenCLIP architectures that `--encoder` takes without a schema, the embedded one first."""
    _register_tiny()
    return [TINY, *(n for n in open_clip.list_models() if n != TINY)]


def describe_encoder(name: str, *, build: bool = True, measure: bool = False) -> dict[str, Any]:
    """Width D, input edge (px), context (tokens), with `build` parameters (millions) of both towers, with `measure` tiles/s here.

    Nothing is downloaded. The parameters of an architecture that needs a package which is not installed are None.

    Raises:
        ModelError: unknown name, or an architecture to measure that cannot be built.
    """
    config = EncoderConfig(name)
    _register_tiny()
    _check_name(config)
    cfg = open_clip.get_model_config(name)
    row = {"name": name, "width": cfg["embed_dim"], "image_px": cfg["vision_cfg"].get("image_size", 224)}
    row["tokens"] = cfg["text_cfg"].get("context_length", 77)
    if build:
        row |= {"image_millions": None, "text_millions": None}
        try:
            with torch.device("meta"), _quiet_open_clip():
                clip = open_clip.create_model(name, device="meta", pretrained_text=False)
            image, both = (sum(p.numel() for p in module.parameters()) / 1e6 for module in (clip.visual, clip))
            row |= {"image_millions": image, "text_millions": both - image}
        except Exception as error:  # as in Encoder.create; here it only leaves two numbers out
            log.debug("%s: %s", name, error)
    if measure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = Encoder.create(config).to(device).eval()
        tiles = torch.zeros((64, *encoder.image_size, 3), dtype=torch.uint8, device=device)
        with torch.inference_mode():
            encoder.encode_tiles(tiles).cpu()  # the first pass warms up
            start, done = time.perf_counter(), 0
            while (spent := time.perf_counter() - start) < 1:
                encoder.encode_tiles(tiles).cpu()
                done += len(tiles)
        row["tiles_per_s"] = done / spent
    return row


def _check_name(config: EncoderConfig) -> None:
    if config.name.startswith(_SCHEMAS):
        return
    known = list_encoders()
    if config.name not in known:
        near = difflib.get_close_matches(config.name, known, n=3, cutoff=0.3)
        raise ModelError(
            f"encoder {config.name!r} is unknown; near names: {', '.join(near) or 'none'}; "
            "or use hf-hub:ORG/NAME, local-dir:FOLDER; `dreslcl encoders` lists all"
        )
    if config.pretrained and not Path(config.pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(config.name)
        if config.pretrained not in tags:
            raise ModelError(
                f"encoder {config.name} has no weights {config.pretrained!r}; tags: {', '.join(tags) or 'none'}; or name a file"
            )


def _explain(config: EncoderConfig, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if config.name.startswith("local-dir:"):
        return (
            f"encoder {config.name} cannot be loaded ({reason}); the folder needs open_clip_config.json and "
            "open_clip_model.safetensors that fit each other"
        )
    if config.name.startswith("hf-hub:") or config.pretrained:
        return (
            f"encoder {config.name} cannot be loaded ({reason}); log in where it is gated (`hf auth login`); without a network, copy "
            "the model's folder (open_clip_config.json and weights) from a machine that has it and use local-dir:FOLDER"
        )
    return f"encoder {config.name} cannot be built ({reason})"


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """OpenCLIP logs each step of loading on the root logger; dreslcl says what matters itself."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
