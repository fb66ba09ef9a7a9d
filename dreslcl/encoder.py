"""The tile encoder: OpenCLIP's towers as dreslcl uses them, and how they compute: views, autocast, gradient caching.

Tiles arrive as uint8 batches; resizing and normalisation follow the model's own preprocessing configuration and run on
the device, in batch. What a report becomes is text.py's.
"""

import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2 as transforms

from .common import ModelError, write_bytes, write_json
from .config import SCHEMAS, EncoderConfig
from .towers import CONFIG, find_timm, from_timm, load_held

TINY, DRAWN = "dreslcl-tiny", "drawn"  # the embedded model, and the tag of its weights: an image tower that knows drawn tissue
CPU_PIXELS = 1 << 18  # in one pass; with more, a CPU waits for memory: EfficientNet-Lite0 at 128 px fell to a quarter of its speed
_BLOCKS = re.compile(r"(transformer\.resblocks|trunk\.(blocks|stages|layers))$")
_STAGES = re.compile(r"(trunk\.)?layer\d$")  # a ResNet's
_AFTER_BLOCKS = re.compile(r"(trunk\.)?(proj|ln_post|norm|fc_norm|head|attn_?pool|final_conv|conv_head)\b")


@dataclass(frozen=True)
class Augmentation:
    """One random view of each of N tiles: quarter turns and flips, and a factor on each colour's optical density."""

    turns: Bool[Tensor, "N 3"]
    """Whether to swap x and y, to flip x, to flip y: together all eight ways to lay a square."""
    stain: Float[Tensor, "N 3"]
    """Factor on the optical density of red, green and blue."""

    @classmethod
    def draw(cls, tiles: int, generator: torch.Generator, jitter: float) -> "Augmentation":
        """Draw views for `tiles` tiles; densities vary by ±`jitter`."""
        turns = torch.randint(0, 2, (tiles, 3), generator=generator).bool()
        return cls(turns, 1 + jitter * (2 * torch.rand((tiles, 3), generator=generator) - 1))

    @classmethod
    def join(cls, views: "Sequence[Augmentation]", device: torch.device) -> "Augmentation":
        """The views of several slides' tiles one after the other, on a device."""
        return cls(*(torch.cat([getattr(v, name) for v in views]).to(device, non_blocking=True) for name in ("turns", "stain")))

    def part(self, start: int, stop: int) -> "Augmentation":
        """The views of tiles start to stop - 1."""
        return Augmentation(self.turns[start:stop], self.stain[start:stop])

    def __call__(self, images: Float[Tensor, "N 3 h w"]) -> Float[Tensor, "N 3 h w"]:
        """Apply to square images with values from 0 to 1, on their device; the host waits for nothing."""
        # Beer-Lambert: scaling the optical density -log(I) by s is I ** s
        images = images.clamp_min(1 / 256) ** self.stain[:, :, None, None]
        swap, flip_x, flip_y = self.turns.T[:, :, None, None, None]
        images = torch.where(swap, images.transpose(2, 3), images)
        images = torch.where(flip_x, images.flip(3), images)
        return torch.where(flip_y, images.flip(2), images)


class Encoder(nn.Module):
    """An OpenCLIP model as tile and text encoder. Make one with `Encoder.create`.

    Attributes:
        dim: D, width of a tile feature (and of a text vector: OpenCLIP has one joint space).
        pretrained: whether weights of the image tower were loaded (else they are random).
        reads: whether the text tower has learnt to read: its weights were loaded, or it learns here. A saved folder tells.
        timm_args: arguments of timm's tower that OpenCLIP's configuration has no place for.
    """

    clip: Any  # OpenCLIP's towers share no base class that names their parts
    mean: Tensor
    std: Tensor

    def __init__(self, clip: nn.Module, tokenizer: Any, model_cfg: dict[str, Any], name: str, *, pretrained: bool, reads: bool):
        super().__init__()
        self.clip, self.tokenizer, self.model_cfg, self.name = clip, tokenizer, model_cfg, name
        self.pretrained, self.reads = pretrained, reads
        visual = self.clip.visual
        self.timm_args: dict[str, Any] = getattr(visual, "timm_args", {})
        size = visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.preprocess_cfg: dict[str, Any] = dict(visual.preprocess_cfg)
        self.dim = int(model_cfg["embed_dim"])
        self.context: int = tokenizer.context_length
        self.register_buffer("mean", torch.tensor(visual.image_mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(visual.image_std)[:, None, None], persistent=False)

    @classmethod
    def create(cls, config: EncoderConfig, *, seed: int = 0) -> "Encoder":
        """Build the model that `config` names; random weights are drawn from `seed`.

        Raises ModelError: unknown name or tag (near names are suggested), a folder without a configuration or with damaged weights, or a
        download that failed (with what to do offline).
        """
        name = config.name
        _check_name(config)
        pretrained = config.has_weights
        with torch.random.fork_rng(devices=[]), _quiet_open_clip():
            torch.manual_seed(seed)
            try:
                tower = find_timm(name)
                if tower:
                    clip, model_cfg = from_timm(*tower, pretrained=pretrained, file=config.pretrained)
                elif name.startswith("local-dir:") and (held := load_held(Path(name.removeprefix("local-dir:")))):
                    clip, model_cfg = held
                else:
                    clip, model_cfg = _from_openclip(config)
                tokenizer = open_clip.SimpleTokenizer() if tower else open_clip.get_tokenizer(name)
            except ModelError:
                raise
            except Exception as error:  # OpenCLIP and timm raise many types for the same few user mistakes
                raise ModelError(_explain(config, error)) from error
        clip.visual.to(memory_format=torch.channels_last)  # convolutions on a CPU: 1.2 to 2 times as fast; no effect on others
        reads = pretrained and not tower and config.pretrained != DRAWN
        if reads and name.startswith("local-dir:"):
            reads = json.loads((Path(name.removeprefix("local-dir:")) / CONFIG).read_text(encoding="utf-8")).get("reads", True)
        return cls(clip, tokenizer, model_cfg, name, pretrained=pretrained, reads=reads)

    # tiles

    def preprocess(self, tiles: UInt8[Tensor, "N H W 3"]) -> Float[Tensor, "N 3 h w"]:
        """Resize and crop to the tower's input as OpenCLIP's inference transform does; values from 0 to 1."""
        images, cfg = tiles.permute(0, 3, 1, 2), self.preprocess_cfg
        if images.shape[2:] != self.image_size:
            ratios, longest = [new / old for new, old in zip(self.image_size, images.shape[2:])], cfg["resize_mode"] == "longest"
            scale = min(ratios) if longest else max(ratios)
            # OpenCLIP rounds the longest edge's partner, torchvision cuts the shortest's
            kept = [round(n * scale) if longest else int(n * scale + 1e-6) for n in images.shape[2:]]
            how = transforms.InterpolationMode.BILINEAR if cfg["interpolation"] == "bilinear" else transforms.InterpolationMode.BICUBIC
            images = transforms.functional.resize(images, self.image_size if cfg["resize_mode"] == "squash" else kept, how)
            images = open_clip.transform.center_crop_or_pad(images, self.image_size, cfg["fill_color"])
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
            parts.append(F.normalize(self.clip.encode_image(images).to(self.mean.dtype), dim=-1))
        return torch.cat(parts)

    # weights

    def tower_parameters(self) -> list[nn.Parameter]:
        """Parameters of the image tower."""
        return list(self.clip.visual.parameters())

    def text_parameters(self) -> list[nn.Parameter]:
        """Parameters of the text tower (OpenCLIP's own logit scale and bias left out: dreslcl has its own)."""
        own = {id(p) for p in self.clip.visual.parameters()}
        return [p for n, p in self.clip.named_parameters() if id(p) not in own and n not in ("logit_scale", "logit_bias")]

    def blocks(self) -> list[nn.Module]:
        """The image tower's blocks (a ViT's, or stages of a convolutional one), first to last; none where it names them otherwise."""
        modules = list(self.clip.visual.named_modules())
        towers = [list(module.children()) for name, module in modules if _BLOCKS.match(name)]
        return towers[0] if towers else [module for name, module in modules if _STAGES.match(name)]

    def learning_rates(self, decay: float) -> dict[nn.Parameter, float]:
        """The factor on the learning rate of each parameter of the image tower: `decay` once more for each block nearer to the image."""
        blocks = self.blocks()
        factors = dict.fromkeys(self.tower_parameters(), decay ** (len(blocks) + 1))
        for depth, block in enumerate(blocks):
            factors |= dict.fromkeys(block.parameters(), decay ** (len(blocks) - depth))
        return factors | {p: 1.0 for name, p in self.clip.visual.named_parameters() if _AFTER_BLOCKS.match(name)}

    def set_trainable(self, tune: str, *, text: bool) -> None:
        """Choose what learns: `tune` is EncoderConfig.tune, `text` the text tower.

        Raises ModelError: the tower has no blocks to count for last:N.
        """
        self.clip.requires_grad_(False)
        self.reads = self.reads or text
        chosen = (self.text_parameters() if text else []) + (self.tower_parameters() if tune == "all" else [])
        if tune.startswith("last:"):
            last, blocks = int(tune[5:]), self.blocks()
            if last and not blocks:
                raise ModelError(f"{self.name}: cannot tell the tower's blocks apart; use --tune all or none")
            chosen += [p for n, p in self.clip.visual.named_parameters() if _AFTER_BLOCKS.match(n)]
            chosen += [p for block in blocks[-last:] for p in block.parameters()] if last else []
        for p in chosen:
            p.requires_grad_(True)

    def train(self, mode: bool = True) -> "Encoder":
        """As nn.Module.train, but batch norm keeps its statistics: bank rows and fresh features must agree."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def fingerprint(self) -> str:
        """Hash of the image tower's architecture, weights and preprocessing (16 hex digits): what a tile feature depends on."""
        architecture = {k: v for k, v in self.model_cfg.items() if k != "text_cfg"} | self.timm_args
        digest = hashlib.sha256(json.dumps([architecture, self.preprocess_cfg], sort_keys=True, default=str).encode())
        for key, value in sorted(self.clip.visual.state_dict().items()):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(value.detach().cpu().reshape(-1).float().numpy()).data)
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write a folder that `Encoder.create` loads, and, but for towers with `timm_args`, `open_clip.create_model_from_pretrained`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in self.clip.state_dict().items()}
        write_bytes(folder / "open_clip_model.safetensors", save(weights))
        if hasattr(self.tokenizer, "tokenizer"):
            self.tokenizer.save_pretrained(folder)
        preprocess = {k: v for k, v in self.preprocess_cfg.items() if k != "size"}  # the architecture says the size
        args = {"timm_args": self.timm_args} if self.timm_args else {}
        write_json(folder / CONFIG, {"model_cfg": self.model_cfg, "preprocess_cfg": preprocess, "reads": self.reads} | args)


def _from_openclip(config: EncoderConfig) -> tuple[nn.Module, dict[str, Any]]:
    """OpenCLIP's model and its configuration."""
    if config.pretrained and config.name.startswith(SCHEMAS):
        raise ModelError(f"{config.name} comes with its weights: leave --pretrained out")
    model_cfg, drawn = open_clip.get_model_config(config.name), (config.name, config.pretrained) == (TINY, DRAWN)
    tag = open_clip.get_pretrained_cfg(config.name, config.pretrained) if config.pretrained else {}
    if tag.get("quick_gelu"):  # OpenCLIP only warns where a name and a tag differ in their activation
        model_cfg["quick_gelu"] = True
    clip = open_clip.create_model(
        config.name,
        None if drawn else config.pretrained,
        force_quick_gelu=model_cfg.get("quick_gelu", False),
        require_pretrained=config.has_weights and not drawn,
        pretrained_text=False,
    )
    if drawn:
        clip.visual.load_state_dict(load_file(Path(__file__).with_name(f"{TINY}.safetensors")))
    return clip, model_cfg


def list_encoders() -> list[str]:
    """Names of all OpenCLIP architectures that `--encoder` takes without a schema, the embedded one first: it is made known to OpenCLIP."""
    if TINY not in open_clip.list_models():
        open_clip.add_model_config(Path(__file__).with_name(f"{TINY}.json"))
    return [TINY, *(n for n in open_clip.list_models() if n != TINY)]


def describe_encoder(name: str) -> tuple[int, int]:
    """Width D and input edge (px) of one of `list_encoders`."""
    cfg = open_clip.get_model_config(name)
    return cfg["embed_dim"], cfg["vision_cfg"].get("image_size", 224)


def _check_name(config: EncoderConfig) -> None:
    if config.name.startswith(SCHEMAS):
        return
    name, given, by_timm = config.name.removeprefix("timm:"), config.pretrained, config.name.startswith("timm:")
    if by_timm:
        name, _, tag = name.partition(".")
        there, known, how = timm.is_model(name), timm.list_models(), f"; write timm:{name}.TAG"
        tags = [found.partition(".")[2] for found in timm.list_pretrained(f"{name}.*")]
    else:
        tag, known, how = "", list_encoders(), ""
        there, tags = name in known, [DRAWN] if name == TINY else open_clip.list_pretrained_tags_by_model(name)
    if not there:
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3)) or "none"
        others = "or use timm:NAME, hf-hub:ORG/NAME, local-dir:FOLDER; `dreslcl encoders` lists all"
        raise ModelError(f"encoder {config.name!r} is unknown; near names: {near}; {others}")
    if (tag and tag not in tags) or (given and not Path(given).is_file() and (by_timm or given not in tags)):
        raise ModelError(f"encoder {config.name} has no weights {given or tag!r}{how}; tags: {', '.join(tags) or 'none'}; or name a file")


def _explain(config: EncoderConfig, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if config.pretrained and Path(config.pretrained).is_file():
        todo = "the file must hold weights of this very architecture, as safetensors or as a state dict without code"
    elif config.name.startswith("local-dir:"):
        todo = "the folder needs open_clip_config.json and open_clip_model.safetensors that fit each other, or timm's files"
    elif config.has_weights:
        todo = (
            "log in where it is gated (`hf auth login`); without a network, copy the model's folder (configuration and weights) from a "
            "machine that has it and use local-dir:FOLDER"
        )
    else:
        return f"encoder {config.name} cannot be built ({reason})"
    return f"encoder {config.name} cannot be loaded ({reason}); {todo}"


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """OpenCLIP logs each step of loading on the root logger; dreslcl says what matters itself."""

    def grave(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logging.root.addFilter(grave)  # for what is logged on the root logger itself; two threads may load at once
    try:
        yield
    finally:
        logging.root.removeFilter(grave)


# how towers compute


def pick_device() -> torch.device:
    """The GPU of this rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
    return torch.device("cpu")


def autocast(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> AbstractContextManager[Any]:
    """bf16 arithmetic for the towers where asked for, or by `auto` on a GPU that computes it itself (older ones emulate it, slowly)."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = precision == "bf16" or (precision == "auto" and able)
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


def cached_features(encode: Callable[..., Float[Tensor, "n D"]], tiles: Sequence[Tensor], tile_batch: int) -> Float[Tensor, "N D"]:
    """Features of N tiles with gradient, whose memory does not grow with N (gradient caching; Gao et al. 2021, arXiv 2101.06983).

    All but the last micro-batch are encoded again, with the same random numbers, when the loss is back-propagated. Same gradients as one
    big batch.

    Args:
        encode: features of some tiles, given the number of the first and then the tiles.
        tile_batch: tiles in one pass. The last pass keeps its graph at once: no other one is in memory meanwhile.
    """
    *starts, last = range(0, len(tiles), tile_batch)
    learns = torch.ones((), requires_grad=True)  # a checkpoint asks for an argument with gradient; the other kind keeps 0.2 MB a tile
    parts = [checkpoint(lambda _, *some: encode(*some), learns, i, *tiles[i : i + tile_batch], use_reentrant=True) for i in starts]
    return torch.cat([*parts, encode(last, *tiles[last:])])
