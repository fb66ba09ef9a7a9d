"""A bank that stays true: what a step writes into it or takes from it, in other ways than dreslcl's, each trained as study.py does.

    bank_study.py WAYS demo FOLDER --out OUT [study.py's arguments]

WAYS, with commas between: `plain`, as it is; `clean`, rows from tiles without augmentation (a second pass of the encoder); `moments`,
the bank's rows and sums moved and scaled, dimension by dimension, as the step's old rows turned into its fresh features; `average`, the
model that is kept is a moving average over the steps (0.95); `average-rows`, the rows are its too (a second pass of the encoder);
`half`, `full`, a control variate: the change of the drawn rows, fresh less old, stands for that of all M tiles half way, or M/T times
(dreslcl: for the T alone). One OUT for each WAYS.

metrics.csv gets three more columns: `shift`, the length of the mean change of a slide's drawn rows; `change`, the root mean square of
what is left of it; `spread`, that of the rows about their mean.
"""

import copy
import sys
from dataclasses import replace

import study
import torch

from dreslcl import trainer
from dreslcl.encoder import autocast
from dreslcl.model import Bag, nearest_codeword, residual_sums

WAYS = sys.argv.pop(1).split(",")
write_back, compute_loss, make_bags, end_epoch = trainer.write_back, trainer.compute_loss, trainer.make_bags, trainer.end_epoch
average = []  # of the run's model


def follow(run):
    """Move the average by a step; its buffers (codewords, statistics) are those of the model."""
    if not average:
        average.append(copy.deepcopy(run.model).requires_grad_(False))
    for mean, now in zip(average[0].parameters(), run.model.parameters()):
        mean.lerp_(now.detach(), 0.05)
    for there, now in zip(average[0].buffers(), run.model.buffers()):
        there.copy_(now)


def end_with_average(run, values):
    """As trainer.end_epoch; the last one saves the average."""
    if run.epoch + 1 == run.config.train.epochs:
        run.model.load_state_dict(average.pop().state_dict())
    end_epoch(run, values)


def change_of_all(run, samples, fresh):
    """As trainer.make_bags, with the change of the drawn rows added to the others' sums; no count falls below zero."""
    first, second, rest, others = make_bags(run, samples, fresh)
    words, old, sizes = run.model.aggregator.codewords, [], [len(s.tiles) for s in samples]
    for s in samples:
        rows, code, weight = s.rest.old[: len(s.tiles)], s.rest.slide.code[s.tiles], s.rest.slide.weight[s.tiles]
        rows, weight = (torch.from_numpy(kind).to(words) for kind in (rows, weight))
        old.append(residual_sums(rows, torch.from_numpy(code.astype("int64")).to(words.device), words, weights=weight))
    sums, counts = (torch.cat(kind) for kind in zip(*old))
    times = torch.tensor([s.rest.slide.tiles / size - 1 for s, size in zip(samples, sizes)]).to(words) * (0.5 if "half" in WAYS else 1)
    drawn = first + second
    sums, counts = rest.sums + times[:, None, None] * (drawn.sums - sums), rest.counts + times[:, None] * (drawn.counts - counts)
    return first, second, Bag(sums, counts.clamp(min=0)), others


def write_other(run, samples, fresh, values):
    """As trainer.write_back, of rows encoded anew."""
    if "average" in WAYS or "average-rows" in WAYS:
        follow(run)
    encoder = run.model.encoder
    rows = list(fresh.features.detach().split([len(s.rest.tiles) for s in samples]))
    measured = []
    for i, s in enumerate(samples):
        if s.pixels is None:
            continue
        if "clean" in WAYS or "average-rows" in WAYS:
            by, views = (average[0].encoder, s.views) if average else (encoder, None)
            with torch.no_grad(), autocast(run.device, run.config.train.precision):
                rows[i] = torch.cat([by.encode_tiles(s.pixels, views), rows[i][len(s.tiles) :]])
        old = torch.from_numpy(s.rest.old[: len(s.tiles)]).float()
        change = rows[i][: len(s.tiles)].float() - old
        about = (change - change.mean(0)).square().sum(1).mean().sqrt(), (old - old.mean(0)).square().sum(1).mean().sqrt()
        measured.append([float(change.mean(0).norm()), *map(float, about)])
    write_back(run, samples, replace(fresh, features=torch.cat(rows)), values)
    values |= zip(("shift", "change", "spread"), torch.tensor(measured).mean(0).tolist())


def move_sums(run, samples, fresh, plan):
    """As trainer.compute_loss, with the other tiles' rows and sums moved as the drawn ones were: x' = a (x - m) + m'."""
    aggregator, words = run.model.aggregator, run.model.aggregator.codewords
    rows = list(fresh.features.split([len(s.rest.tiles) for s in samples]))
    new = torch.cat([r[: len(s.tiles)].detach() for r, s in zip(rows, samples)])
    old = torch.cat([torch.from_numpy(s.rest.old[: len(s.tiles)]).to(new) for s in samples])
    scale = (new.std(0) / old.std(0).clamp(min=1e-6)).clamp(0.5, 2)
    rows = torch.cat([torch.cat([r[: (T := len(s.tiles))], scale * (r[T:] - old.mean(0)) + new.mean(0)]) for r, s in zip(rows, samples)])
    fresh, moved = trainer.Fresh(rows, nearest_codeword(rows, words), aggregator.weigh(rows)), []
    for s in samples:
        sums, counts = (kind.to(new) for kind in s.rest.others)
        n = counts[..., None]
        sums = scale * (sums + n * (words - old.mean(0))) + n * (new.mean(0) - words)
        used = s.rest.used
        rest = replace(s.rest, others=(sums, counts), sums=sums[used].sum(0), counts=counts[used].sum(0))
        moved.append(replace(s, rest=rest))
    return compute_loss(run, moved, fresh, plan)


if __name__ == "__main__":
    if unknown := set(WAYS) - {"plain", "clean", "moments", "average", "average-rows", "half", "full"}:
        raise SystemExit(f"no way {', '.join(unknown)}")
    trainer.write_back = write_other
    if "moments" in WAYS:
        trainer.compute_loss = move_sums
    if {"average", "average-rows"} & set(WAYS):
        trainer.end_epoch = end_with_average
    if {"half", "full"} & set(WAYS):
        trainer.make_bags = change_of_all
    study.main()
