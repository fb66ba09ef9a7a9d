"""An aggregator of your own: each codeword's mean residual, the largest over codewords; then as `dreslcl`.

    python examples/own_aggregator.py pretrain work --reports reports.csv --out run --aggregator max
    python examples/own_aggregator.py embed work --model run/model --out emb

Whatever loads such a model needs the class in AGGREGATORS first; `eval` of classes does not load it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dreslcl import AGGREGATORS, Aggregator
from dreslcl.cli import main


class MaxResidual(Aggregator):
    """`bag.sums` (B, K, D) and `bag.counts` (B, K) come from all tiles of B slides; see dreslcl/model.py for the others."""

    def __init__(self, dim, joint_dim, config):
        super().__init__(dim, joint_dim, config)  # codewords and the slides' mean feature
        self.layers = nn.Sequential(nn.Linear(2 * dim, config.width), nn.GELU(), nn.Linear(config.width, joint_dim))

    def forward(self, bag):
        largest = (bag.sums / bag.counts.clamp(min=1)[..., None]).amax(1)
        return F.normalize(self.layers(torch.cat([largest, self.mean(bag) / self.spread], 1)), dim=1)


AGGREGATORS["max"] = MaxResidual

if __name__ == "__main__":
    main()
