"""A bank that stays true: what a step writes into it or takes from it, in other ways than dreslcl's, each trained as study.py does.

    bank_study.py WAYS demo FOLDER --out OUT [study.py's arguments]

WAYS, with commas between: `plain`, as it is; `clean`, rows from tiles without augmentation (a second pass of the encoder);
`moments`, the bank's sums moved and scaled, dimension by dimension, as the step's old rows turned into its fresh features. One OUT for each
WAYS.

metrics.csv gets three more columns: `shift`, the length of the mean change of a slide's drawn rows; `change`, the root mean square of
what is left of it; `spread`, that of the rows about their mean.
"""

import sys
from dataclasses import replace

import study
import torch

from dreslcl import trainer
from dreslcl.encoder import autocast

WAYS = sys.argv.pop(1).split(",")
write_back, compute_loss = trainer.write_back, trainer.compute_loss


def write_other(run, samples, fresh, values):
    """As trainer.write_back, of rows encoded anew."""
    encoder = run.model.encoder
    rows = list(fresh.features.detach().split([len(s.rest.tiles) for s in samples]))
    measured = []
    for i, s in enumerate(samples):
        if s.pixels is None:
            continue
        if "clean" in WAYS:
            with torch.no_grad(), autocast(run.device, run.config.train.precision):
                rows[i] = torch.cat([encoder.encode_tiles(s.pixels), rows[i][len(s.tiles) :]])
        old = torch.from_numpy(s.rest.old[: len(s.tiles)]).float()
        change = rows[i][: len(s.tiles)].float() - old
        about = (change - change.mean(0)).square().sum(1).mean().sqrt(), (old - old.mean(0)).square().sum(1).mean().sqrt()
        measured.append([float(change.mean(0).norm()), *map(float, about)])
    write_back(run, samples, replace(fresh, features=torch.cat(rows)), values)
    values |= zip(("shift", "change", "spread"), torch.tensor(measured).mean(0).tolist())


def move_sums(run, samples, fresh, plan):
    """As trainer.compute_loss, with the other tiles' sums moved as the drawn ones were: x' = a (x - m) + m'."""
    new = torch.cat([rows[: len(s.tiles)] for rows, s in zip(fresh.features.detach().split([len(s.rest.tiles) for s in samples]), samples)])
    old = torch.cat([torch.from_numpy(s.rest.old[: len(s.tiles)]).to(new) for s in samples])
    scale = (new.std(0) / old.std(0).clamp(min=1e-6)).clamp(0.5, 2)
    words = run.model.aggregator.codewords
    moved = []
    for s in samples:
        sums, counts = (kind.to(new) for kind in s.rest.others)
        n = counts[..., None]
        sums = scale * (sums + n * (words - old.mean(0))) + n * (new.mean(0) - words)
        used = s.rest.used
        rest = replace(s.rest, others=(sums, counts), sums=sums[used].sum(0), counts=counts[used].sum(0))
        moved.append(replace(s, rest=rest))
    return compute_loss(run, moved, fresh, plan)


if __name__ == "__main__":
    if unknown := set(WAYS) - {"plain", "clean", "moments"}:
        raise SystemExit(f"no way {', '.join(unknown)}")
    trainer.write_back = write_other
    if "moments" in WAYS:
        trainer.compute_loss = move_sums
    study.main()
