"""Residual encoding: tiles of a slide → residual sums to a codebook → one vector.

R_k = Σ_{q(x)=k} (x − c_k) and n_k, the number of tiles nearest to codeword k (VLAD; Jégou et al. 2010). R is a sum over tiles, so a
step takes the bank's sums without its T old rows and adds the T fresh features: the result, forward and gradient, is that of all
M tiles at a cost that does not depend on M. All maths here is float32, also under autocast.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int64, Integer
from torch import Tensor, nn

from .bank import MemoryBank
from .common import ConfigError, StoreError, fingerprint, write_bytes
from .config import ModelConfig

log = logging.getLogger(__name__)

LEFT_OUT_ROWS = 256  # most rows of a slide that `stale_dropout` takes out of the bank's sums: each has to be read


def assign(features: Float[Tensor, "N D"], codewords: Float[Tensor, "K D"]) -> Int[Tensor, "N"]:
    """The nearest codeword of each feature: argmin of |c|² − 2 x·c (no gradient)."""
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        words = codewords.float()
        return torch.addmm((words**2).sum(1), features.float(), words.T, alpha=-2).argmin(1)


def residual_sums(
    features: Float[Tensor, "N D"], codes: Int[Tensor, "N"], codewords: Float[Tensor, "K D"]
) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K"]]:
    """Sum the residual of every tile to its codeword (VLAD; Jégou et al. 2010).

    Returns the sums and the number of tiles per codeword. A codeword without tiles has a sum of exactly zero.
    """
    residuals = features.float() - codewords[codes]  # before summing: Σx − n·c would leave rounding noise
    sums = torch.zeros_like(codewords, dtype=torch.float32).index_add(0, codes, residuals)
    return sums, torch.bincount(codes, minlength=len(codewords)).float()


def assignment_shares(features: Float[Tensor, "N D"], codewords: Float[Tensor, "K D"], soft: float) -> Float[Tensor, "N K"]:
    """How much of each tile goes to each codeword: all to the nearest (`soft` 0), or a softmax of −soft·|x − c|²."""
    if not soft:
        return nn.functional.one_hot(assign(features, codewords), len(codewords)).float()
    return (2 * soft * features @ codewords.T - soft * (codewords**2).sum(1)).softmax(1)


def encode_residuals(
    features: Float[Tensor, "N D"], codewords: Float[Tensor, "K D"], soft: float = 0.0
) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K"]]:
    """Residual sums and counts of tiles, assigned hard (`soft` 0) or shared out by a softmax of −soft·|x − c|² (ablation).

    Sums and counts of parts of a slide add up to those of the slide.
    """
    if not soft:
        return residual_sums(features, assign(features, codewords), codewords)
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        shares = assignment_shares(features, codewords, soft)
        middle = codewords.mean(0)  # both terms stay small, so their difference keeps its digits
        return shares.T @ (features - middle) - shares.sum(0)[:, None] * (codewords - middle), shares.sum(0)


@dataclass(frozen=True)
class Stale:
    """What the bank gives of B slides beside their drawn tiles."""

    sums: Float[Tensor, "B K D"]
    counts: Float[Tensor, "B K"]
    weights: Float64[np.ndarray, "B"]
    """How many tiles each drawn tile stands for, so that counts sum to what they would be without `stale_dropout`."""
    tiles: Int64[np.ndarray, "B"]
    """Tiles of the slide that are counted: the drawn ones, and those of the bank before `stale_dropout`."""


def stale_residuals(
    bank: MemoryBank,
    slides: Sequence[str],
    tiles: Sequence[Integer[np.ndarray, "_"]],
    codewords: Float[Tensor, "K D"],
    *,
    bank_tiles: int = 0,
    stale_dropout: float = 0.0,
    soft: float = 0.0,
    rngs: Sequence[np.random.Generator] = (),
) -> Stale:
    """Residual sums and counts of the bank rows of all tiles but the drawn ones; arguments as `refreshed_residuals`."""
    (K, D), B = codewords.shape, len(slides)
    sums, counts = torch.zeros(B, K, D), torch.zeros(B, K)
    weights, totals = np.ones(B), np.zeros(B, np.int64)
    for b, (slide, index) in enumerate(zip(slides, tiles)):
        M = totals[b] = bank.tiles(slide)
        if not (bank_tiles or soft):
            out = index[:0]
            if stale_dropout:
                out = _other_tiles(index, M, min(rngs[b].binomial(M - len(index), stale_dropout), LEFT_OUT_ROWS), rngs[b])
            sums[b], counts[b] = map(torch.from_numpy, bank.residuals(slide, without=np.concatenate([index, out])))
            weights[b] = (len(index) + len(out)) / max(len(index), 1)
            continue
        if bank_tiles and bank_tiles < M - len(index):
            rest = np.sort(_other_tiles(index, M, bank_tiles, rngs[b]))
        else:
            rest = np.delete(np.arange(M), index)
        kept = rest[rngs[b].random(len(rest)) >= stale_dropout] if stale_dropout else rest
        weights[b] = (len(index) + len(rest) - len(kept)) / max(len(index), 1)
        totals[b] = len(index) + len(rest)
        if soft:
            rows = torch.from_numpy(bank.gather(slide, kept)).to(codewords.device)
            sums[b], counts[b] = encode_residuals(rows, codewords.detach(), soft)
        else:
            sums[b], counts[b] = map(torch.from_numpy, bank.residuals(slide, kept))
    return Stale(sums.to(codewords.device), counts.to(codewords.device), weights, totals)


def _other_tiles(index: Integer[np.ndarray, "_"], M: int, count: int, rng: np.random.Generator) -> Integer[np.ndarray, "_"]:
    """Draw `count` of the M tiles of a slide that are not in `index`, without listing all M."""
    others = rng.choice(M - len(index), count, replace=False)  # numbered as if `index` were not there
    return others + np.searchsorted(np.sort(index) - np.arange(len(index)), others, side="right")


def refreshed_residuals(
    bank: MemoryBank | None,
    slides: Sequence[str],
    tiles: Sequence[Integer[np.ndarray, "_"]],
    fresh: Float[Tensor, "N D"],
    codewords: Float[Tensor, "K D"],
    *,
    bank_tiles: int = 0,
    stale_dropout: float = 0.0,
    gradient_scale: Literal["1", "full"] = "1",
    soft: float = 0.0,
    rngs: Sequence[np.random.Generator] = (),
) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B K"]]:
    """Residual sums and counts of B slides: of all their tiles, some with fresh features, the others with their bank rows.

    Gradients flow through `fresh` alone. By default the bank gives its running sums and only the old rows of the
    drawn tiles are read; `stale_dropout` reads the rows it leaves out too, `bank_tiles` and `soft` those they use.

    Args:
        bank: None: a slide is its fresh tiles.
        slides: ids of the B slides.
        tiles: for each slide the distinct tile indices that `fresh` holds, in its order; lengths may differ, and be zero.
        fresh: features of all drawn tiles, slide after slide, N = Σ lengths.
        codewords: the bank's codebook, on the device of `fresh`.
        bank_tiles: use only so many bank rows of a slide, drawn from its other tiles; 0: all.
        stale_dropout: leave out each bank row with this probability, of the running sums 256 rows of a slide at most; fresh tiles are
            weighted up so that the counts still sum to what they would be (stale embedding dropout; Cao et al. 2023, arXiv 2305.12322).
        gradient_scale: "full" multiplies the gradient of each fresh feature such that it estimates that of all M tiles; "1" leaves it.
        soft: sharpness of a soft assignment, see `encode_residuals`.
        rngs: one for each slide, for `bank_tiles` and `stale_dropout`; needed for these two.
    """
    B, (K, D), device = len(slides), codewords.shape, fresh.device
    drawn = np.array([len(index) for index in tiles], np.int64)
    assert drawn.sum() == len(fresh) and len(tiles) == B, f"{len(fresh)} features for {drawn.tolist()} tiles"
    if bank is None:
        stale = Stale(torch.zeros(B, K, D, device=device), torch.zeros(B, K, device=device), np.ones(B), drawn)
    else:
        stale = stale_residuals(bank, slides, tiles, codewords, bank_tiles=bank_tiles, stale_dropout=stale_dropout, soft=soft, rngs=rngs)
    slide_of = torch.from_numpy(np.repeat(np.arange(B), drawn)).to(device)  # (N,)
    weights = torch.from_numpy(stale.weights).float().to(device)
    with torch.autocast(device.type, enabled=False):
        fresh = fresh.float()
        if gradient_scale == "full":
            factor = torch.from_numpy(stale.tiles / np.maximum(drawn * stale.weights, 1)).float().to(device)[slide_of]
            fresh = fresh.detach() + factor[:, None] * (fresh - fresh.detach())  # the value stays, bit for bit
        if soft:
            parts = [encode_residuals(part, codewords, soft) for part in fresh.split(drawn.tolist())]
            return (
                stale.sums + torch.stack([sums for sums, _ in parts]) * weights[:, None, None],
                stale.counts + torch.stack([counts for _, counts in parts]) * weights[:, None],
            )
        codes = assign(fresh, codewords)
        cells = slide_of * K + codes  # (slide, codeword) pairs: one index_add for the batch
        residuals = (fresh - codewords[codes]) * weights[slide_of, None]
        sums = stale.sums.view(B * K, D).index_add(0, cells, residuals).view(B, K, D)
        return sums, stale.counts.view(-1).index_add(0, cells, weights[slide_of]).view(B, K)


@dataclass(frozen=True)
class Codebook:
    """K codewords and the fingerprint of the encoder whose features they cluster."""

    codewords: Float32[np.ndarray, "K D"]
    encoder: str

    @property
    def fingerprint(self) -> str:
        """Identifies the codewords and the encoder."""
        return fingerprint(self.encoder, self.codewords.shape, self.codewords.tobytes().hex())

    @classmethod
    def fit(cls, rows: Float32[np.ndarray, "n D"], K: int, *, seed: int, encoder: str) -> "Codebook":
        """K-means of bank rows (k-means++, best of 3; in mini-batches above 20,000 rows). Logs occupancy and inertia.

        A codeword that ends without rows moves to the row farthest from its own codeword.

        Raises:
            ConfigError: fewer than K distinct rows.
        """
        from sklearn.cluster import KMeans, MiniBatchKMeans

        distinct = len(np.unique(np.ascontiguousarray(rows).view(np.dtype((np.void, rows[:1].nbytes))))) if len(rows) else 0
        if distinct < K:
            raise ConfigError(
                f"{K} codewords asked for, but the {len(rows):,} sampled tile features have {distinct} distinct values; use fewer codewords"
            )
        settings = {"n_clusters": K, "init": "k-means++", "n_init": 3, "random_state": seed}
        model = KMeans(**settings) if len(rows) <= 20_000 else MiniBatchKMeans(**settings, batch_size=8192)
        codewords = torch.from_numpy(model.fit(rows).cluster_centers_.astype(np.float32))
        features = torch.from_numpy(rows)
        for _ in range(K):
            codes = assign(features, codewords)
            occupancy = torch.bincount(codes, minlength=K)
            distance = (features - codewords[codes]).square().sum(1)
            if occupancy.all():
                break
            codewords[occupancy.argmin()] = features[distance.argmax()]
        share = occupancy / len(rows)
        log.info(
            "codebook: %d codewords from %d rows, mean squared distance %.4g, share of rows per codeword %.2g to %.2g",
            *(K, len(rows), distance.mean(), share.min(), share.max()),
        )
        return cls(codewords.numpy(), encoder)

    def match(self, old: "Codebook") -> "Codebook":
        """The same codewords, ordered so that codeword k is the one that took the place of `old`'s codeword k (Hungarian)."""
        from scipy.optimize import linear_sum_assignment

        distance = ((old.codewords[:, None] - self.codewords[None]) ** 2).sum(2)
        return replace(self, codewords=self.codewords[linear_sum_assignment(distance)[1]])

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        from safetensors.numpy import save

        write_bytes(path, save({"codewords": self.codewords}, metadata={"version": "1", "encoder": self.encoder}))

    @classmethod
    def load(cls, path: Path, encoder: str | None = None) -> "Codebook":
        """Read what `save` wrote.

        Raises:
            StoreError: not there, not a codebook, or fitted on another encoder's features.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                book = cls(file.get_tensor("codewords"), (file.metadata() or {})["encoder"])
        except (OSError, SafetensorError, KeyError) as error:
            raise StoreError(f"{path}: not a codebook ({error})") from error
        if encoder is not None and book.encoder != encoder:
            raise StoreError(f"{path}: the codebook was fitted with encoder {book.encoder}, asked for {encoder}; fit it anew")
        return book


class ResidualAggregator(nn.Module):
    """Residual sums of a slide → its vector z, unit norm, (E,).

    One token per codeword: its residual sum at unit length, plus an embedding of the codeword, plus its share of the tiles. A
    small pre-norm Transformer with a CLS token reads them. A linear path from the slide's mean feature, standardised with the
    training slides' means, is added: features of an encoder differ between slides in few, small directions, and raw they drown.
    """

    codewords: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, dim: int, joint_dim: int, config: ModelConfig):
        super().__init__()
        self.config = config
        K, width = config.codewords, config.width
        self.register_buffer("codewords", torch.zeros(K, dim))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))
        self.project = nn.Linear(dim, width)
        self.codeword = nn.Parameter(torch.randn(K, width) * 0.5)
        self.count = nn.Linear(1, width) if config.count_term else None
        self.cls = nn.Parameter(torch.randn(width) * 0.5)
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 2 * width, config.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, config.depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, joint_dim)
        self.mean_head = nn.Linear(dim, joint_dim, bias=False) if config.mean_path else None

    def set_codebook(self, codewords: Float32[np.ndarray, "K D"], slide_means: Float32[np.ndarray, "S D"]) -> None:
        """Take over a codebook, and what standardises the mean path: mean and deviation of the training slides' mean features."""
        self.codewords.copy_(torch.from_numpy(codewords))
        self.centre.copy_(torch.from_numpy(slide_means.mean(0)))
        self._set_spread(torch.from_numpy(slide_means.std(0)))

    def _set_spread(self, spread: Float[Tensor, "D"]) -> None:
        """Divide by a tenth of the typical deviation at least: a feature that is the same in all slides would become noise, then NaN."""
        typical = spread.square().mean().sqrt()
        self.spread.copy_(spread.clamp_min(0.1 * typical) if typical > 1e-6 else torch.ones_like(spread))

    def track(self, means: Float[Tensor, "B D"], momentum: float = 0.9) -> None:
        """Let what standardises the mean path follow the features of a tile encoder that learns (running mean and deviation, no gradient).

        Held at their first values, they blow the drift of a young encoder until nothing is learnt. The momentum rests on single runs that
        differed in other settings too (demo cohort, seed 0, AUROC: 0.3 gave .68 to .82, 0.9 gave .86): a hint, not a finding.
        """
        with torch.no_grad():
            means = means.detach() + self.centre  # `mean` gives them less the centre
            self.centre.lerp_(means.mean(0), momentum)
            self._set_spread(self.spread.square().lerp((means - self.centre).square().mean(0), momentum).sqrt())

    def mean(self, sums: Float[Tensor, "B K D"], counts: Float[Tensor, "B K"]) -> Float[Tensor, "B D"]:
        """Each slide's mean feature less the centre: Σ n_k (c_k − centre) and Σ R_k over M, which keeps the digits of small differences."""
        return (sums.sum(1) + counts @ (self.codewords - self.centre)) / counts.sum(1, keepdim=True).clamp(min=1e-12)

    def forward(self, sums: Float[Tensor, "B K D"], counts: Float[Tensor, "B K"]) -> Float[Tensor, "B E"]:
        """Encode B slides. A codeword without tiles has a residual of exactly zero."""
        with torch.autocast(sums.device.type, enabled=False):
            n = counts[..., None]
            if self.config.intra_norm:  # soft below a mean residual of 1e-3: tiles on their codeword leave zero, not noise at unit length
                length = (sums.square().sum(2, keepdim=True) + (1e-3 * n).square()).masked_fill(n == 0, 1).sqrt()
            else:
                length = n.masked_fill(n == 0, 1).sqrt()
            tokens = self.project((sums / length).masked_fill(n == 0, 0) * sums.shape[2] ** 0.5) + self.codeword
            if self.count is not None:
                share = n / n.sum(1, keepdim=True).clamp(min=1e-12)
                tokens = tokens + self.count(torch.log1p(share * sums.shape[1]))
            read = self.transformer(torch.cat([self.cls.expand(len(tokens), 1, -1), tokens], 1))[:, 0]
            z = self.head(read)
            if self.mean_head is not None:
                z = z + self.mean_head(self.mean(sums, counts) / self.spread)
            return nn.functional.normalize(z, dim=1)
