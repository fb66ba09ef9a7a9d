"""Every setting, once: frozen dataclasses whose defaults and help the command line shows, read from and written to TOML.

B slides in a batch · T tiles encoded with gradient per slide · M tiles of a slide · D tile feature · K codewords ·
E joint space · S slides. The paper (arXiv 2511.05034) does not publish K, T, B, learning rates, epochs or the
temperature where we can read them: these defaults are ours.
"""

import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .common import ConfigError, TableError, read_text, write_text

SCHEMAS = ("hf-hub:", "local-dir:")  # of encoders that come with their weights
Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, in words and as a test
POSITIVE: Rule = ("be positive", lambda value: value > 0)
SHARE: Rule = ("be from 0 to 1", lambda value: 0 <= value <= 1)
PART: Rule = ("be above 0 and at most 1", lambda value: 0 < value <= 1)
TUNE: Rule = ("be all, none or last:N", lambda tune: tune in ("all", "none") or (tune.startswith("last:") and tune[5:].isdigit()))
FRACTION: Rule = ("be between 0 and 1", lambda value: 0 < value < 1)


def at_least(low: int, unit: str = "") -> Rule:
    """The rule of numbers with a smallest one."""
    return f"be at least {low}{unit}", lambda value: value >= low


AMOUNT = at_least(0)


def setting(default: Any, text: str, rule: Rule | None = None) -> Any:
    """A field with a default, the help of its flag (with its unit), and the rule for its value; none as a value has no rule."""
    return field(default=default, metadata={"help": text, "rule": rule})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class Settings:
    """A configuration whose values are held against their rules; one that breaks its rule is a ConfigError that names both."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.metadata["rule"] and value is not None:
                words, holds = one.metadata["rule"]
                _require(all(map(holds, value if isinstance(value, tuple) else (value,))), f"{one.name} must {words}, got {value!r}")


@dataclass(frozen=True)
class TileConfig(Settings):
    """Where tiles lie on a scan."""

    size: int = setting(256, "Tile edge as the encoder sees it, pixels.", at_least(16, " px"))
    mpp: float = setting(0.5, "Tile resolution, µm per pixel.", POSITIVE)
    overlap: int = setting(0, "Pixels (at the tile's resolution) that neighbouring tiles share.", AMOUNT)
    min_tissue: float = setting(0.3, "Smallest fraction of a tile that must be tissue.", SHARE)
    max_tiles: int = setting(0, "Keep at most this many tiles of a slide, drawn evenly over it; 0 keeps all.", AMOUNT)
    default_mpp: float | None = setting(None, "Resolution of level 0 for scans that do not say it, µm per pixel.", POSITIVE)
    threshold: float | None = setting(None, "Saturation (0-1) above which a mask pixel is tissue; none: Otsu's method.", FRACTION)
    drop_pen: bool = setting(False, "Leave out tiles under pen marks.")
    min_sharpness: float = setting(0.0, "Leave out tiles less sharp than this (variance of the Laplacian, grey²); 0 keeps all.", AMOUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.overlap < self.size, f"overlap must be less than size ({self.size} px), got {self.overlap}")


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """The OpenCLIP model that encodes tiles and reports."""

    name: str = setting("dreslcl-tiny", "An OpenCLIP name, timm:NAME.TAG, hf-hub:ORG/NAME, local-dir:FOLDER, or the embedded dreslcl-tiny.")
    pretrained: str | None = setting(None, "OpenCLIP's tag, or a weights file; none: those of the hub, folder or timm's TAG, else random.")
    init: str | None = setting(None, "RUN/model of an earlier run, in place of --encoder: its tile encoder and aggregator are the start.")
    tune: str = setting("all", "Which part of the tile encoder learns: all, last:N (its last N blocks and what follows) or none.", TUNE)
    text: str = setting("auto", "Reports are read by lsa, tower, tower:tune (of --encoder) or sentence:NAME; auto: medical tower or lsa.")

    @property
    def has_weights(self) -> bool:
        """Whether weights are loaded; else they are random."""
        timm_tag = self.name.startswith("timm:") and "." in self.name
        return bool(self.pretrained or self.init) or timm_tag or self.name.startswith(SCHEMAS)


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The aggregator: tile features of a slide -> one vector."""

    aggregator: str = setting("residual", "How tiles become one vector: residual, attention, mean-mlp, or your own in model.AGGREGATORS.")
    codewords: int = setting(16, "K, entries of the codebook.", ("be from 2 to 65,535", lambda k: 2 <= k <= 65535))
    width: int = setting(128, "Width of the aggregator's layers.", ("be a multiple of 4 (the attention heads)", lambda w: w % 4 == 0))
    depth: int = setting(2, "Layers of the aggregator's Transformer.", at_least(1))
    dropout: float = setting(0.3, "Dropout in the aggregator.", ("be from 0 to below 1", lambda share: 0 <= share < 1))
    mean_path: bool = setting(True, "Add a linear path from the slide's mean feature.")
    joint_dim: int = setting(512, "E, width of the joint space, where a text tower that learns does not fix it.", at_least(1))


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The training loop."""

    epochs: int = setting(30, "Passes over the slides.", at_least(1))
    batch: int = setting(16, "B, slides in a batch over all ranks.", at_least(2, " slides (a contrast needs two)"))
    tiles: int = setting(16, "T, tiles encoded with gradient per slide and step.", at_least(1))
    tile_batch: int = setting(128, "Tiles in one pass of the encoder: bounds memory, changes no result.", at_least(1))
    bank_share: float = setting(0.5, "Share of a slide's other tiles a step uses, drawn anew; 0: no bank. Random weights need 1.", SHARE)
    view_weight: float = setting(1.0, "Weight of the report-free objective, drawn tiles and a slide's others as a pair; 0: off.", AMOUNT)
    report_part: float = setting(0.5, "Share of a report's pieces used at a step, drawn anew each time; 1: all.", PART)
    leak_words: str = setting("", "Mask these words (commas between, * for any ending) out of the reports: how much of a score is theirs.")
    lr: float = setting(3e-4, "Peak learning rate of the aggregator and the heads; that of its gate is ten times it.", AMOUNT)
    encoder_lr: float = setting(1e-4, "Peak learning rate of the tile encoder; from random weights it needs about 1e-3.", AMOUNT)
    layer_decay: float = setting(1.0, "Factor on encoder_lr for each block nearer to the image; 0.75 is usual for a large ViT.", PART)
    text_lr: float = setting(1e-4, "Peak learning rate of the text tower where it learns.", AMOUNT)
    weight_decay: float = setting(0.05, "AdamW's weight decay.", AMOUNT)
    temperature: float = setting(0.07, "Temperature at the start; it is learnt.", POSITIVE)
    sampling: Literal["random", "window"] = setting("random", "How T tiles are drawn: uniformly, or consecutive along a Hilbert curve.")
    stain_jitter: float = setting(0.15, "Each colour's optical density varies by up to this share, tiles are turned; 0: neither.", AMOUNT)
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "Arithmetic of the towers; auto: bf16 on a GPU that has it.")
    workers: int = setting(0, "Threads that read tiles ahead; 0: one per CPU.", AMOUNT)
    cache_gb: float = setting(2.0, "Keep decoded tiles in memory while all of the cohort's fit in so much, GB.", AMOUNT)
    seed: int = setting(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        views = self.bank_share > 0 or self.tiles >= 2 or not self.view_weight
        _require(views, f"without a bank the two views of view_weight need tiles 2 or more, got {self.tiles}")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """The evaluation protocol."""

    folds: int = setting(5, "Cross-validation folds, grouped by patient.", at_least(2))
    bootstrap: int = setting(1000, "Resamples of patients behind each 95 % interval.", at_least(1))
    shots: tuple[int, ...] = setting((1, 10, 25), "Training patients per class of the few-shot probes.", at_least(1))
    seed: int = setting(0, "Seed of folds, draws and resamples.")


TABLES = {"tile": TileConfig, "encoder": EncoderConfig, "model": ModelConfig, "train": TrainConfig, "eval": EvalConfig}


@dataclass(frozen=True)
class RunConfig:
    """All of one pretraining run: what `RUN/config.toml` holds."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def save(self, path: Path) -> None:
        """Write one TOML table per part; settings that are none are left out."""
        lines = {part: [f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None] for part, values in asdict(self).items()}
        write_text(path, "\n\n".join("\n".join([f"[{part}]", *of]) for part, of in lines.items()) + "\n")

    @classmethod
    def load(cls, path: Path) -> "RunConfig":
        """Read what `save` wrote; a table or setting that is absent has its default.

        Raises ConfigError: as `read_settings`, or a value that makes no sense.
        """
        tables, default = read_settings(path), cls()
        return updated(default, **{part: tables[part] for part in vars(default)})


def updated(config: RunConfig, **parts: dict[str, Any]) -> RunConfig:
    """The configuration with some settings changed: part name -> {setting: value}. Raises ConfigError: a value that makes no sense."""
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in parts.items()})


def read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Table -> its settings in a TOML file, {} if absent. Raises ConfigError: not TOML, an unknown table or setting, a wrong type."""
    try:
        tables = tomllib.loads(read_text(path))
    except (TableError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable TOML file ({error})") from error
    for name, table in tables.items():
        _require(name in TABLES and isinstance(table, dict), f"{path}: unknown table [{name}]; there are {', '.join(TABLES)}")
    return {name: _typed(config, tables.get(name, {}), f"{path} [{name}]") for name, config in TABLES.items()}


def _typed(config: type, table: dict[str, Any], where: str) -> dict[str, Any]:
    typed, known = {}, get_type_hints(config)
    for key, value in table.items():
        _require(key in known, f"{where}: unknown key {key!r}; there are {', '.join(known)}")
        kinds = get_args(known[key]) or (known[key],)
        if get_origin(known[key]) is Literal:
            _require(value in kinds, f"{where}: {key} must be one of {', '.join(kinds)}, got {value!r}")
        elif get_origin(known[key]) is tuple:
            same = isinstance(value, list) and all(type(item) is kinds[0] for item in value)
            _require(same, f"{where}: {key} should be a list of {kinds[0].__name__}, got {value!r}")
            value = tuple(value)
        else:
            value = float(value) if float in kinds and type(value) is int else value
            _require(type(value) in kinds, f"{where}: {key} should be of type {kinds[0].__name__}, got {value!r}")
        typed[key] = value
    return typed


PRESETS = {
    "paper": RunConfig(
        EncoderConfig("timm:vit_small_patch16_224.dino"),
        ModelConfig(codewords=32, width=256),
        TrainConfig(tiles=64, batch=32, encoder_lr=1e-5),
    ),
    "tiny": RunConfig(
        EncoderConfig(pretrained="drawn"),
        ModelConfig(codewords=8, width=64, depth=1),
        TrainConfig(epochs=40, stain_jitter=0.4, tile_batch=512),
    ),
    "clip-b32": RunConfig(EncoderConfig(name="ViT-B-32", pretrained="openai"), ModelConfig(width=256), TrainConfig(encoder_lr=1e-5)),
}
"""Known settings.

`paper`: ViT-S/16 from DINO's weights (arXiv 2104.14294) on 256 px tiles at 0.5 µm/px (TileConfig's defaults). `tiny`: the embedded
encoder, whose weights know drawn tissue (examples/tiny_weights.py), on a small cohort, as in `dreslcl demo`. `clip-b32`: OpenAI's CLIP.
"""
