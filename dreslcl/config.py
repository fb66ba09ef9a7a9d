"""Every knob, once: frozen dataclasses whose defaults the command line shows, read from and written to TOML.

B slides in a batch · T tiles encoded with gradient per slide · M tiles of a slide · D tile feature · K codewords ·
E joint space · S slides. The paper (arXiv 2511.05034) does not publish K, T, B, learning rates, epochs or the
temperature where we can read them: these defaults are ours.
"""

import ast
import inspect
import itertools
import json
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .common import ConfigError, TableError, read_text, write_text


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class TileConfig:
    """Where tiles lie on a scan."""

    size: int = 256
    """Tile edge as the encoder sees it, pixels."""
    mpp: float = 0.5
    """Tile resolution, µm per pixel."""
    overlap: int = 0
    """Pixels (at the tile's resolution) that neighbouring tiles share."""
    min_tissue: float = 0.3
    """Smallest fraction of a tile that must be tissue."""
    max_tiles: int = 0
    """Keep at most this many tiles of a slide, drawn evenly over it; 0 keeps all."""
    default_mpp: float | None = None
    """Resolution of level 0 for scans that do not say it, µm per pixel."""
    threshold: float | None = None
    """Saturation above which a mask pixel is tissue (0-1); none: Otsu's method."""
    drop_pen: bool = False
    """Leave out tiles under pen marks."""
    min_sharpness: float = 0.0
    """Leave out tiles blurrier than this (variance of the Laplacian, grey levels²); 0 keeps all."""

    def __post_init__(self) -> None:
        _require(self.size >= 16, f"size must be at least 16 px, got {self.size}")
        _require(self.mpp > 0, f"mpp must be positive, got {self.mpp}")
        _require(0 <= self.overlap < self.size, f"overlap must be from 0 to {self.size - 1} px, got {self.overlap}")
        _require(0 <= self.min_tissue <= 1, f"min_tissue is a fraction from 0 to 1, got {self.min_tissue}")
        _require(self.default_mpp is None or self.default_mpp > 0, f"default_mpp must be positive, got {self.default_mpp}")
        _require(self.max_tiles >= 0, f"max_tiles must be 0 (all) or more, got {self.max_tiles}")
        _require(self.threshold is None or 0 < self.threshold < 1, f"threshold is a saturation from 0 to 1, got {self.threshold}")
        _require(self.min_sharpness >= 0, f"min_sharpness must be 0 (off) or more, got {self.min_sharpness}")


@dataclass(frozen=True)
class EncoderConfig:
    """The OpenCLIP model that encodes tiles and reports."""

    name: str = "dreslcl-tiny"
    """An OpenCLIP model name, hf-hub:ORG/NAME, local-dir:FOLDER, or the embedded dreslcl-tiny (random weights)."""
    pretrained: str | None = None
    """OpenCLIP's tag of pretrained weights, or a weights file; none: random weights, or those of the hub or folder."""
    tune: str = "all"
    """Which part of the tile encoder learns: all, last:N (its last N blocks and what follows them) or none."""
    text: str = "auto"
    """What reads the reports: lsa (their own words), tower or tower:tune (the encoder's), sentence:NAME; auto: a tower that knows
    medicine, else lsa."""

    @property
    def has_weights(self) -> bool:
        """Whether weights are loaded; else they are random."""
        return bool(self.pretrained) or self.name.startswith(("hf-hub:", "local-dir:"))

    def __post_init__(self) -> None:
        good = self.tune in ("all", "none") or (self.tune.startswith("last:") and self.tune[5:].isdigit())
        _require(good, f"tune must be all, none or last:N, got {self.tune!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The aggregator: tile features of a slide -> one vector."""

    aggregator: str = "residual"
    """How a slide's tiles become one vector: residual, attention, mean-mlp, or a name of your own in model.AGGREGATORS."""
    codewords: int = 16
    """K, entries of the codebook."""
    width: int = 128
    """Width of the aggregator's layers."""
    depth: int = 2
    """Layers of the aggregator's Transformer."""
    dropout: float = 0.3
    """Dropout in the aggregator."""
    mean_path: bool = True
    """Add a linear path from the slide's mean feature."""
    joint_dim: int = 512
    """E, width of the joint space, where a text tower that learns does not fix it."""

    def __post_init__(self) -> None:
        _require(2 <= self.codewords <= 65535, f"codewords must be from 2 to 65,535, got {self.codewords}")
        _require(self.width % 4 == 0, f"width must be a multiple of 4 (the attention heads), got {self.width}")
        _require(self.depth >= 1, f"depth must be at least 1, got {self.depth}")
        _require(0 <= self.dropout < 1, f"dropout must be from 0 to below 1, got {self.dropout}")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 30
    """Passes over the slides."""
    batch: int = 16
    """B, slides in a batch over all ranks."""
    tiles: int = 16
    """T, tiles encoded with gradient per slide and step."""
    tile_batch: int = 128
    """Tiles in one pass of the encoder: bounds memory, changes no result."""
    bank_share: float = 0.5
    """Share of a slide's other tiles that a step takes from the bank, others each time; 1: all, 0: no bank. From random weights use 1."""
    view_weight: float = 1.0
    """Weight of the report-free objective, a slide's drawn tiles and its other tiles as a positive pair; 0: off."""
    report_part: float = 0.5
    """Share of a report's pieces used at a step, drawn anew each time; 1: all."""
    leak_words: str = ""
    """Words masked out of the training reports, commas between, * for any ending: how much of a score is the report's own word?"""
    lr: float = 3e-4
    """Peak learning rate of the aggregator and the heads."""
    encoder_lr: float = 1e-4
    """Peak learning rate of the tile encoder; from random weights it needs about 1e-3."""
    text_lr: float = 1e-4
    """Peak learning rate of the text tower where it learns."""
    weight_decay: float = 0.05
    """AdamW's weight decay."""
    temperature: float = 0.07
    """Temperature at the start; it is learnt."""
    sampling: Literal["random", "window"] = "random"
    """How T tiles are drawn: uniformly, or consecutive along a Hilbert curve (every tile within M/T visits)."""
    stain_jitter: float = 0.15
    """Each colour's optical density varies by up to this share from tile to tile, which are flipped and turned too; 0: none of it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the towers; auto: bf16 on a GPU that has it."""
    workers: int = 0
    """Threads that read tiles ahead; 0: one per CPU."""
    cache_gb: float = 2.0
    """Keep decoded tiles in memory while all of the cohort's fit in so much, GB."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        _require(self.batch >= 2, f"batch must be at least 2 slides (a contrast needs two), got {self.batch}")
        for name in ("epochs", "tiles", "tile_batch"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        views = self.bank_share > 0 or self.tiles >= 2 or not self.view_weight
        _require(views, f"without a bank the two views of view_weight need tiles 2 or more, got {self.tiles}")
        _require(0 <= self.bank_share <= 1, f"bank_share is a share from 0 to 1, got {self.bank_share}")
        _require(0 < self.report_part <= 1, f"report_part must be above 0 and at most 1, got {self.report_part}")
        _require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        for name in ("lr", "encoder_lr", "text_lr", "weight_decay", "view_weight", "stain_jitter", "workers", "cache_gb"):
            _require(getattr(self, name) >= 0, f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class EvalConfig:
    """The evaluation protocol."""

    folds: int = 5
    """Cross-validation folds, grouped by patient."""
    bootstrap: int = 1000
    """Resamples of patients behind each 95 % interval."""
    shots: tuple[int, ...] = (1, 10, 25)
    """Training patients per class of the few-shot probes."""
    seed: int = 0
    """Seed of folds, draws and resamples."""

    def __post_init__(self) -> None:
        _require(self.folds >= 2, f"folds must be at least 2, got {self.folds}")
        _require(self.bootstrap >= 1, f"bootstrap must be at least 1, got {self.bootstrap}")
        _require(all(n >= 1 for n in self.shots), f"shots must be at least 1 each, got {self.shots}")


@dataclass(frozen=True)
class RunConfig:
    """All of one pretraining run: what `RUN/config.toml` holds."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def save(self, path: Path) -> None:
        """Write one TOML table per part; knobs that are none are left out."""
        blocks = []
        for name, values in asdict(self).items():
            lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
            blocks.append("\n".join([f"[{name}]", *lines]))
        write_text(path, "\n\n".join(blocks) + "\n")

    @classmethod
    def load(cls, path: Path) -> "RunConfig":
        """Read what `save` wrote; a table or knob that is absent has its default.

        Raises:
            ConfigError: as `read_knobs`, or a value that makes no sense.
        """
        knobs = read_knobs(path)
        return updated(cls(), encoder=knobs[EncoderConfig], model=knobs[ModelConfig], train=knobs[TrainConfig])


def updated(config: RunConfig, **parts: dict[str, Any]) -> RunConfig:
    """The configuration with some knobs changed: part name -> {knob: value}.

    Raises:
        ConfigError: a value that makes no sense.
    """
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in parts.items()})


TABLES = {"tile": TileConfig, "encoder": EncoderConfig, "model": ModelConfig, "train": TrainConfig, "eval": EvalConfig}


def read_knobs(path: Path) -> dict[type, dict[str, Any]]:
    """The knobs that a TOML file sets, by the configuration class that its tables [tile], [encoder], [model], [train], [eval] stand for.

    Raises:
        ConfigError: not TOML, an unknown table or knob, or a value of the wrong type.
    """
    try:
        tables = tomllib.loads(read_text(path))
    except (TableError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable TOML file ({error})") from error
    for name, table in tables.items():
        _require(name in TABLES and isinstance(table, dict), f"{path}: unknown table [{name}]; there are {', '.join(TABLES)}")
    return {config: _typed(config, tables.get(name, {}), f"{path} [{name}]") for name, config in TABLES.items()}


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
            same = type(value) in kinds or (float in kinds and type(value) is int)
            _require(same, f"{where}: {key} should be of type {kinds[0].__name__}, got {value!r}")
        typed[key] = float(value) if float in kinds and type(value) is int else value
    return typed


def knob_help(config: type) -> dict[str, str]:
    """The docstring below each field of a configuration class: the one place that says what a knob does."""
    (definition,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(definition, ast.ClassDef)
    pairs = itertools.pairwise(definition.body)
    return {
        ast.unparse(knob.target): str(text.value.value)
        for knob, text in pairs
        if isinstance(knob, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


PRESETS = {
    "paper": RunConfig(
        EncoderConfig(name="ViT-S-16"),
        ModelConfig(codewords=32, width=256),
        TrainConfig(tiles=64, batch=32, encoder_lr=1e-5),
    ),
    "tiny": RunConfig(
        EncoderConfig(),
        ModelConfig(codewords=8, width=64, depth=1),
        TrainConfig(epochs=110, encoder_lr=1e-3, bank_share=1.0, report_part=1.0, stain_jitter=0.4, tile_batch=512),
    ),
    "clip-b32": RunConfig(EncoderConfig(name="ViT-B-32", pretrained="openai"), ModelConfig(width=256), TrainConfig(encoder_lr=1e-5)),
}
"""Known settings.

`paper`: ViT-S/16 on 256 px tiles at 0.5 µm/px (TileConfig's defaults) with frozen text. `tiny`: the embedded encoder, learnt from
random weights on a small cohort as in `dreslcl demo`: stain jitter keeps it from learning slides by heart; with
tiles left out (bank_share below 1) it would not begin to learn. `clip-b32`: OpenAI's CLIP.
"""
