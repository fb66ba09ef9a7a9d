"""The method on one page: residual sums, the aggregators that read them, the loss, and DRESLCL with its folder.

A slide has M tiles with features x. Each goes to its nearest codeword q(x); R_k = Σ_{q(x)=k} a(x) (x − c_k) and n_k = Σ_{q(x)=k} a(x)
(VLAD; Jégou et al. 2010), with a weight a that an aggregator may learn from the tile alone. Both are sums over tiles, so a slide is
**drawn + rest**: the tiles of this step, through which the gradient flows, and all others as the memory bank has them (bank.py), at a
cost that does not depend on M. An aggregator turns the sums into the slide's vector z; the loss pulls z to the vector u of the slide's
report. All maths here is float32, also under autocast.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .common import ConfigError, ModelError, SlideError, fingerprint, reason, write_bytes, write_json, write_text
from .config import EncoderConfig, ModelConfig, TileConfig
from .encoder import Encoder, inference
from .formats import model_card
from .slide import Slide
from .text import Text
from .tiles import find_tiles

VERSION = 2
HEADS = 4  # attention heads of the Transformer
BOUND = 5.0  # of the log of a tile's weight, so that no tile runs away
FLAT = 1e-3  # mean residual below which a codeword's sum fades to zero, so that tiles on their codeword leave no noise at unit length


# residual sums


def nearest_codeword(features: Float[Tensor, "N D"], codewords: Float[Tensor, "K D"]) -> Int[Tensor, "N"]:
    """The nearest codeword of each feature as the bank stores it (float16): argmin of |c|² − 2 x·c. No gradient."""
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        return torch.addmm((codewords**2).sum(1), features.half().to(codewords.dtype), codewords.T, alpha=-2).argmin(1)


def residual_sums(
    features: Float[Tensor, "N D"],
    codes: Int[Tensor, "N"],
    codewords: Float[Tensor, "K D"],
    *,
    weights: Float[Tensor, "N"] | None = None,
    part_of: Int[Tensor, "N"] | None = None,
    parts: int = 1,
) -> tuple[Float[Tensor, "P K D"], Float[Tensor, "P K"]]:
    """Sum the residual of every tile to its codeword, and its weight (VLAD; Jégou et al. 2010), apart for each of P parts.

    A codeword without tiles has a sum of exactly zero.

    Args:
        weights: a(x) of each tile; 1 without.
        part_of: the part of each tile: a slide of the batch, or a block of a slide. All in part 0 without.
    """
    (K, D), cells = codewords.shape, codes if part_of is None else part_of * len(codewords) + codes
    residuals = features.to(codewords.dtype) - codewords[codes]  # before summing: Σx − n·c would leave rounding noise
    weights = residuals.new_ones(len(residuals)) if weights is None else weights
    sums = residuals.new_zeros(parts * K, D).index_add(0, cells, residuals * weights[:, None])
    return sums.view(parts, K, D), residuals.new_zeros(parts * K).index_add(0, cells, weights).view(parts, K)


@dataclass(frozen=True)
class Bag:
    """What an aggregator reads of B slides, or of parts of them: parts of the same slides add up."""

    sums: Float[Tensor, "B K D"]
    counts: Float[Tensor, "B K"]
    rows: tuple[Tensor, ...] = ()  # features (n, D) of each slide's tiles, where the aggregator needs them
    weights: tuple[Tensor, ...] = ()  # (n,) beside them

    def __add__(self, other: "Bag") -> "Bag":
        rows, weights = (tuple(map(torch.cat, zip(*pair))) for pair in ((self.rows, other.rows), (self.weights, other.weights)))
        return Bag(self.sums + other.sums, self.counts + other.counts, rows, weights)


# aggregators


class Aggregator(nn.Module):
    """A bag of B slides → their vectors z (B, E), unit norm. Subclass it, give `forward`, and put the class into `AGGREGATORS`.

    Attributes:
        codewords: (K, D), fitted by K-means on bank rows.
        centre, spread: mean and deviation of the training slides' mean features: what `standardised` uses.
        needs_rows: whether `forward` reads `bag.rows`. Sums cost nothing that grows with M; rows are read anew at each step.
    """

    needs_rows = False

    def __init__(self, dim: int, joint_dim: int, config: ModelConfig):
        super().__init__()
        self.config = config
        self.register_buffer("codewords", torch.zeros(config.codewords, dim))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))

    def weigh(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """The weight a(x) of each tile in all sums; 1 unless the aggregator says otherwise."""
        return torch.ones_like(features[:, 0])

    def bag(self, features: Float[Tensor, "M D"], factor: Float[Tensor, "M"] | None = None) -> Bag:
        """The bag of one slide (B = 1) from its tile features, each of which counts `factor` times (once, without)."""
        weights = self.weigh(features) if factor is None else self.weigh(features) * factor
        sums = residual_sums(features, nearest_codeword(features, self.codewords), self.codewords, weights=weights)
        return Bag(*sums, (features,), (weights,)) if self.needs_rows else Bag(*sums)

    def mean(self, bag: Bag) -> Float[Tensor, "B D"]:
        """Each slide's weighted mean feature less the centre: Σ n_k (c_k − centre) + Σ R_k, over Σ n_k: small differences keep digits."""
        total = bag.counts.sum(1, keepdim=True).clamp(min=1e-12)
        return (bag.sums.sum(1) + bag.counts @ (self.codewords - self.centre)) / total

    def standardised(self, features: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """Features less the centre, over the deviation: slides differ in few, small directions, and raw they drown."""
        return (features - self.centre) / self.spread

    @torch.no_grad()
    def set_statistics(self, slide_means: Float[Tensor, "S D"], momentum: float = 1.0) -> None:
        """Take centre and spread from slides' mean features; with `momentum` below 1 move towards them.

        While a tile encoder learns they follow the batch (0.9): held still, they blow up the drift of a young encoder until nothing is
        learnt. The spread is a tenth of the typical one at least: a feature that is the same in all slides would become noise, then NaN.
        """
        self.centre.lerp_(slide_means.mean(0), momentum)
        spread = self.spread.square().lerp((slide_means - self.centre).square().mean(0), momentum).sqrt()
        typical = spread.square().mean().sqrt()
        self.spread.copy_(torch.where(typical > 1e-6, spread.clamp_min(0.1 * typical), 1))  # without a branch: a GPU need not be asked


class Gate(nn.Module):
    """A score of each tile by itself, s(x) = w·(tanh(V x) ⊙ σ(U x)) (Ilse et al. 2018, eq. 9), with x at a mean square of 1: standardised
    as slides' means are, single tiles lie far out, where tanh and σ are flat and learn nothing; the farther, the more tiles a slide has."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.value, self.gate, self.score = nn.Linear(dim, width), nn.Linear(dim, width), nn.Linear(width, 1, bias=False)

    def forward(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
        x = F.rms_norm(x, x.shape[-1:])
        return self.score(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))[:, 0]


class ResidualAggregator(Aggregator):
    """One token per codeword: its residual sum at unit length, an embedding of the codeword, its share of the tiles. A small pre-norm
    Transformer with a CLS token reads them. A linear path from the slide's standardised mean feature is added (`mean_path`).

    A gated score s of the standardised tile (without a softmax over the tiles, so that sums stay sums) gives it the weight
    a(x) = exp(5 tanh(s/5)): where 1 % of the tiles tell, they can outweigh the rest.
    """

    def __init__(self, dim: int, joint_dim: int, config: ModelConfig):
        super().__init__(dim, joint_dim, config)
        K, width = config.codewords, config.width
        self.project = nn.Linear(dim, width)
        self.codeword = nn.Parameter(torch.randn(K, width) * 0.5)
        self.count = nn.Linear(1, width)
        self.cls = nn.Parameter(torch.randn(width) * 0.5)
        layer = nn.TransformerEncoderLayer(width, HEADS, 2 * width, config.dropout, activation="gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, config.depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, joint_dim)
        self.mean_head = nn.Linear(dim, joint_dim, bias=False) if config.mean_path else None
        self.gate = Gate(dim, width)

    def weigh(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """a(x), from exp(−5) to exp(5)."""
        with torch.autocast(features.device.type, enabled=False):
            score = self.gate(self.standardised(features.to(self.centre.dtype)))
            return torch.exp(BOUND * torch.tanh(score / BOUND))

    def forward(self, bag: Bag) -> Float[Tensor, "B E"]:
        """Encode B slides. A codeword without tiles has a residual of exactly zero."""
        with torch.autocast(bag.sums.device.type, enabled=False):
            (_, K, D), n = bag.sums.shape, bag.counts[..., None]
            length = (bag.sums.square().sum(2, keepdim=True) + (FLAT * n).square()).masked_fill(n == 0, 1).sqrt()
            tokens = self.project((bag.sums / length).masked_fill(n == 0, 0) * D**0.5) + self.codeword
            share = n / n.sum(1, keepdim=True).clamp(min=1e-12)
            tokens = tokens + self.count(torch.log1p(share * K))
            z = self.head(self.transformer(torch.cat([self.cls.expand(len(tokens), 1, -1), tokens], 1))[:, 0])
            if self.mean_head is not None:
                z = z + self.mean_head(self.mean(bag) / self.spread)
            return F.normalize(z, dim=1)


class MeanMLP(Aggregator):
    """The slide's standardised mean feature through two layers."""

    def __init__(self, dim: int, joint_dim: int, config: ModelConfig):
        super().__init__(dim, joint_dim, config)
        hidden = nn.Sequential(nn.Linear(dim, 2 * config.width), nn.GELU(), nn.Dropout(config.dropout))
        self.layers = nn.Sequential(hidden, nn.Linear(2 * config.width, joint_dim))

    def forward(self, bag: Bag) -> Float[Tensor, "B E"]:
        return F.normalize(self.layers(self.mean(bag) / self.spread), dim=1)


class AttentionPooling(MeanMLP):
    """Gated attention over the tiles (Ilse et al. 2018, arXiv 1802.04712), then the same two layers. Reads a slide's rows: O(M) a step."""

    needs_rows = True

    def __init__(self, dim: int, joint_dim: int, config: ModelConfig):
        super().__init__(dim, joint_dim, config)
        self.gate = Gate(dim, config.width)

    def forward(self, bag: Bag) -> Float[Tensor, "B E"]:
        pooled = []
        for rows, weights in zip(bag.rows, bag.weights):
            x = self.standardised(rows.to(self.centre.dtype))
            pooled.append((self.gate(x) + weights.log()).softmax(0) @ x)
        return F.normalize(self.layers(torch.stack(pooled)), dim=1)


AGGREGATORS: dict[str, type[Aggregator]] = {"residual": ResidualAggregator, "attention": AttentionPooling, "mean-mlp": MeanMLP}
"""Name of `--aggregator` -> class. Add your own before training and before loading."""


# loss


def contrastive_loss(z: Float[Tensor, "B E"], u: Float[Tensor, "B E"], reports: Int[Tensor, "B"], scale: Tensor) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (Radford et al. 2021); `scale` is the inverse temperature.

    Slides with the same report number are positives of each other; without such pairs the value equals OpenCLIP's ClipLoss.
    """
    logits = scale * z @ u.T
    same = (reports[:, None] == reports).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)  # symmetric
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def unevenness(weights: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Divergence of a slide's weights from even ones (Kullback-Leibler), nats: 0 where all tiles weigh alike, log n where one is all."""
    return math.log(len(weights)) - torch.special.entr(weights / weights.sum()).sum()


# the whole model


class DRESLCL(nn.Module):
    """Tile encoder, text encoder, aggregator and heads.

    Attributes:
        encoder: image tower (and its text tower); None where tile features came from elsewhere and no tower reads the reports.
        text: how a report becomes a vector.
        aggregator: bag of B slides -> z (B, E), unit norm.
        text_head: report vectors -> joint space; None where the text tower learns, its vectors being u themselves.
        logit_scale, view_scale: logs of the inverse temperatures of the two contrasts (slide and report, two views), learnt.
        about: what else the model's folder tells: settings of its tiles, slides seen in pretraining.
    """

    def __init__(
        self, encoder: Encoder | None, text: Text, config: ModelConfig, *, dim: int, temperature: float = 0.07, about: dict | None = None
    ):
        super().__init__()
        if config.aggregator not in AGGREGATORS:
            raise ConfigError(f"no aggregator {config.aggregator!r}; there are {', '.join(AGGREGATORS)}; put your own into AGGREGATORS")
        self.config, self.dim, self.about = config, dim, about or {}
        self.encoder, self.text = encoder, text
        self.joint_dim = text.dim if text.learns else config.joint_dim
        self.aggregator = AGGREGATORS[config.aggregator](dim, self.joint_dim, config)
        self.text_head = None if text.learns else nn.Linear(text.dim, self.joint_dim, bias=False)
        self.register_buffer("text_centre", torch.zeros(text.dim))
        self.logit_scale, self.view_scale = (nn.Parameter(torch.tensor(math.log(1 / temperature))) for _ in range(2))

    def project_text(self, vectors: Float[Tensor, "B X"]) -> Float[Tensor, "B E"]:
        """Report vectors -> u, unit norm. Vectors that do not learn crowd in a narrow cone: centred on the training reports' mean first."""
        if self.text_head is None:
            return F.normalize(vectors, dim=-1)
        return F.normalize(self.text_head(vectors - self.text_centre), dim=-1)

    device = property(lambda self: self.text_centre.device, doc="Where the weights are.")

    # use after training

    def embed_tiles(self, tiles: np.ndarray) -> Float32[np.ndarray, "N D"]:
        """Unit-norm features of tiles, uint8 (N, H, W, 3). Raises ModelError: the model was trained on features made elsewhere."""
        with inference(self):
            return self._tile_encoder().encode_tiles(torch.from_numpy(tiles).to(self.device)).cpu().numpy()

    def bag_of(self, parts: Iterable[Float[np.ndarray, "_ D"]]) -> Bag:
        """The bag (B = 1) of a slide's tile features, given in parts; rounded to float16 as in the bank, so both give the same.

        Raises ModelError: features of another width than the model's D.
        """
        total = None
        with inference(self):
            for part in parts:
                if (D := part.shape[1]) != self.dim:
                    raise ModelError(f"features have width {D}, the model was trained on width {self.dim}; use the same tile encoder")
                bag = self.aggregator.bag(torch.from_numpy(part.astype(np.float16)).to(self.device).float())
                total = bag if total is None else total + bag
        assert total is not None, "a slide without tiles has no vector"
        return total

    def embed_features(self, parts: Iterable[Float[np.ndarray, "_ D"]]) -> Float32[np.ndarray, "E"]:
        """The slide vector of a slide's tile features, given in parts. Raises ModelError as `bag_of`."""
        with inference(self):
            return self.aggregator(self.bag_of(parts))[0].cpu().numpy()

    def embed_slide(self, scan: str | Path, *, batch: int = 128) -> Float32[np.ndarray, "E"]:
        """The slide vector of a scan: its tissue tiles, all encoded. Nothing is written, memory does not grow with the scan.

        Raises ModelError: the model has no tile encoder (it was trained on features); SlideError: the scan cannot be read, or holds no
        tissue.
        """
        self._tile_encoder()
        with Slide.open(Path(scan)) as slide:
            grid = find_tiles(slide, TileConfig(**self.about["tile"]))
            if not len(grid):
                raise SlideError(f"{scan}: no tissue found, so there is nothing to embed")
            corners = (grid.xy[i : i + batch] for i in range(0, len(grid), batch))
            return self.embed_features(self.embed_tiles(slide.read_tiles(xy, grid.size, grid.mpp)) for xy in corners)

    def embed_text(self, texts: str | Sequence[str | np.ndarray]) -> Float32[np.ndarray, "*N E"]:
        """Joint-space vectors of texts, or of reports' vectors (n, X) made elsewhere. ModelError: a text, to a model of such vectors."""
        many = [texts] if isinstance(texts, str) else list(texts)
        with inference(self):
            vectors = self.project_text(torch.stack([self.text.vector(text) for text in many]).to(self.device)).cpu().numpy()
        return vectors[0] if isinstance(texts, str) else vectors

    def _tile_encoder(self) -> Encoder:
        if self.encoder is None or self.about.get("tiles") == "features":
            raise ModelError("this model has no tile encoder of its own: it was trained on features made elsewhere")
        return self.encoder

    # the folder

    def _own_state(self) -> dict[str, Tensor]:
        return {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items() if not k.startswith(("encoder.", "text."))}

    def fingerprint(self) -> str:
        """Hash of all that an embedding depends on (16 hex digits)."""
        own = {k: v.double().sum().item() for k, v in self._own_state().items()}
        return fingerprint(own, self.encoder.fingerprint() if self.encoder else None)

    def save(self, folder: Path) -> None:
        """Write config.json, weights.safetensors, the text encoder and, with an encoder, the OpenCLIP folder open_clip/.

        The configuration goes first and comes last: between the two the folder is no model, never a mix of an older and this one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        if self.encoder is not None:
            self.encoder.save(folder / "open_clip")
        self.text.save(folder)
        write_bytes(folder / "weights.safetensors", save(self._own_state()))
        write_text(folder / "README.md", model_card(self.about, self.encoder, self.text.kind, asdict(self.config)))
        header = {"version": VERSION, "model": asdict(self.config), "dim": self.dim, "about": self.about}
        write_json(folder / "config.json", header | {"encoder": self.encoder is not None})

    @classmethod
    def load(cls, folder: Path) -> "DRESLCL":
        """Read a model folder, in evaluation mode, on the CPU. Raises ModelError: no model there, or none that is whole and known."""
        folder = Path(folder)
        try:
            header = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if header["version"] != VERSION:
                raise ModelError(f"{folder}: version {header['version']}, this dreslcl reads version {VERSION}")
            encoder = Encoder.create(EncoderConfig(name=f"local-dir:{folder / 'open_clip'}")) if header["encoder"] else None
            text = Text.load(folder, encoder)
            model = cls(encoder, text, ModelConfig(**header["model"]), dim=header["dim"], about=header["about"])
            missing, extra = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, ConfigError) as error:
            why = reason(error)
            raise ModelError(f"{folder}: not a whole dreslcl model folder ({why}); give RUN/model of a finished pretrain") from error
        if extra or any(not k.startswith(("encoder.", "text.")) for k in missing):
            raise ModelError(f"{folder}: weights.safetensors does not fit config.json; was one of them replaced?")
        return model.eval()
