"""The weights of the tiles, in other ways than dreslcl's, each trained as study.py does.

    gate_study.py WAYS bags FOLDER --out OUT [study.py's arguments]

WAYS, with commas between: `plain`, as it is; `raw`, the gate sees tiles as long as they are; `rate=R`, the gate's learning rate over
`lr` (dreslcl: 10); `even=L`, L times `unevenness` is added to the loss (dreslcl: 0.1); `bound=B`, of the log of a weight (dreslcl: 5);
`drawn=N`, tiles drawn of a slide with the encoder at rest (dreslcl: half, up to 1,024); `beside=N`, rows weighed anew beside them
(dreslcl: 448 where the encoder learns, else 0, so `drawn=16,beside=448` is what a learning encoder's gate sees); `rows`, all tiles
carry the gate's gradient, read anew at each step as attention pooling does; `heads=H`, the same with H gates, each with sums of its
own; `moments`, the same with a second token for each codeword, from the deviation of its residuals. One OUT for each WAYS.
"""

import sys
from dataclasses import replace

import study
import torch
from torch import nn

from dreslcl import model, trainer
from dreslcl.bank import MemoryBank
from dreslcl.model import Aggregator, Bag, ResidualAggregator, nearest_codeword, residual_sums

WAYS = dict(way.partition("=")[::2] for way in sys.argv.pop(1).split(","))


class AllRows(ResidualAggregator):
    """The residual aggregator with sums made in `forward`, so that each of a slide's tiles carries gradient: O(M)."""

    needs_rows = True
    weigh = Aggregator.weigh
    heads = int(WAYS.get("heads", 1))
    parts = 2 if "moments" in WAYS else heads  # tokens of a codeword

    def __init__(self, dim, joint_dim, config):
        super().__init__(dim, joint_dim, replace(config, codewords=config.codewords * self.parts))
        self.config, self.codewords = config, self.codewords[: config.codewords].clone()
        self.gate.score = nn.Linear(config.width, self.heads, bias=False)

    def mean(self, bag):
        K = len(self.codewords)
        if self.heads > 1:
            heads = map(Bag, bag.sums.split(K, 1), bag.counts.split(K, 1))
            return torch.stack([super(AllRows, self).mean(head) for head in heads]).mean(0)
        return super().mean(Bag(bag.sums[:, :K], bag.counts[:, :K]))

    def tokens(self, rows, factor):
        words, codes = self.codewords, nearest_codeword(rows, self.codewords)
        gate, x = self.gate, nn.functional.rms_norm(self.standardised(rows), rows.shape[-1:])
        scores = gate.score(torch.tanh(gate.value(x)) * torch.sigmoid(gate.gate(x)))
        weights = torch.exp(model.BOUND * torch.tanh(scores / model.BOUND)) * factor[:, None]
        found = [residual_sums(rows, codes, words, weights=w) for w in weights.T]
        if "moments" in WAYS:
            sums, counts = found[0]
            n = counts[..., None].clamp(min=1e-6)
            squares = torch.zeros_like(sums[0]).index_add(0, codes, (rows - words[codes]).square() * weights)
            deviation = (squares / n - (sums / n).square() + 1e-8).sqrt() * (counts[..., None] > 0)
            found.append((deviation * n, counts))
        return [torch.cat(kind, 1) for kind in zip(*found)]

    def forward(self, bag):
        sums, counts = zip(*(self.tokens(rows.float(), factor) for rows, factor in zip(bag.rows, bag.weights)))
        return super().forward(Bag(torch.cat(sums), torch.cat(counts)))


def rows_beside(number, rest=MemoryBank.rest):
    """MemoryBank.rest with so many rows beside the drawn ones."""
    return lambda self, slide, drawn, share, rng, beside=0: rest(self, slide, drawn, share, rng, number)


if __name__ == "__main__":
    for name, value in WAYS.items():
        if name in ("rows", "heads", "moments"):
            model.AGGREGATORS["residual"] = AllRows
        elif name == "bound":
            model.BOUND = float(value)
        elif name == "drawn":
            trainer.ROWS_AT_REST = int(value)
        elif name == "beside":
            MemoryBank.rest = rows_beside(int(value))
        elif name == "even":
            trainer.EVEN = float(value)
        elif name == "rate":
            trainer.GATE_RATE = float(value)
        elif name == "raw":
            model.F.rms_norm = lambda x, shape: x
        elif name != "plain":
            raise SystemExit(f"no way {name}")
    study.main()
