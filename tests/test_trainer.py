"""The training loop on a cohort of tiny scans: one path in all modes, gradients, ranks, going on, faults, what is measured."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import sums_of, torchrun
from torch._subclasses.fake_tensor import FakeTensorMode

from dreslcl import trainer
from dreslcl.bank import SlideFile, block_of
from dreslcl.cohort import Cohort
from dreslcl.common import ConfigError, DreslclError, SlideError, StoreError, hashed, read_table
from dreslcl.config import EncoderConfig, ModelConfig, RunConfig, TrainConfig
from dreslcl.distributed import Ranks
from dreslcl.embedding import embed
from dreslcl.formats import find_features
from dreslcl.model import DRESLCL
from dreslcl.trainer import Run, effective_rank, pretrain

SMALL = RunConfig(
    EncoderConfig(text="tower:tune"),
    ModelConfig(codewords=4, width=16, depth=1, dropout=0.0),
    TrainConfig(epochs=2, batch=4, tiles=4, tile_batch=64, encoder_lr=1e-3, bank_share=1.0, workers=1),
)
FROZEN = replace(SMALL, encoder=replace(SMALL.encoder, tune="none"))


def changed(settings=SMALL, **changes):
    return replace(settings, train=replace(settings.train, **changes))


def rows_of(out):
    return read_table(out / "metrics.csv")


def learnt(out):
    """Those rows without what a clock says."""
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "time/"))} for row in rows_of(out)]


def open_run(cohort, out, settings=SMALL, held_out=None, gate=True) -> Run:
    """A run that is ready for its first step; without `gate` all tiles weigh 1."""
    run = trainer.open_run(cohort, held_out or Cohort(()), settings, out, Ranks())
    if not gate and settings.model.aggregator == "residual":
        torch.nn.init.zeros_(run.model.aggregator.gate.score.weight)
    run.bank.create()
    trainer.fill_bank(run)
    trainer.read_reports(run)
    trainer.set_codebook(run, refit=True)
    return run


def first_step(run: Run, members=None):
    """Samples and plan of the first step, or of some slides."""
    plan = [np.array(members)] if members is not None else trainer.plan_steps(run)[0]
    return [trainer.draw_sample(run, int(m)) for m in plan[0]], plan


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Gradients of the first step's loss, by parameter name (the optimiser is kept from moving), in float64."""
    run.model.double().train()
    run.pieces = [p.double() if isinstance(p, torch.Tensor) else p for p in run.pieces]
    run.optimizer.step = lambda *_: None
    trainer.train_step(run, *first_step(run))
    return {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}


# the step


@pytest.mark.parametrize("views", [0.0, 1.0])
@pytest.mark.parametrize("text", ["texts", "vectors"])
@pytest.mark.parametrize("tiles", ["encoder", "bank"])
def test_all_eight_ways_to_train_run_and_move_what_should_learn(cohort, work, features, tmp_path, monkeypatch, tiles, text, views):
    if text == "vectors":
        cohort = Cohort.load(work).with_reports(None, tmp_path / "vectors.npz")
    settings = changed(SMALL if tiles == "encoder" else FROZEN, view_weight=views)
    run = open_run(cohort, tmp_path, settings)
    if tiles == "bank":
        monkeypatch.setattr(run.reader, "read", lambda *_: pytest.fail("pixels were read"))
    before, encoder = {n: p.clone() for n, p in run.model.named_parameters()}, run.model.encoder.fingerprint()
    values = trainer.run_epoch(run)
    assert all(np.isfinite(v) for v in values.values()) and ("row_cosine" in values) == (tiles == "encoder")
    assert (run.model.encoder.fingerprint() == encoder) == (tiles == "bank")
    moved = {n.split(".")[0] for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert {"aggregator", "logit_scale"} <= moved and ("view_scale" in moved) == bool(views)
    assert ("encoder" in moved) == (tiles == "encoder" or text == "texts")


@pytest.mark.parametrize("settings", [{}, {"bank_share": 0.5}, {"bank_share": 0.0}, {"tile_batch": 5, "bank_share": 0.3}], ids=str)
def test_gradient_caching_gives_the_gradients_of_one_big_batch_and_encodes_all_but_the_last_part_twice(cohort, tmp_path, spy, settings):
    runs = [open_run(cohort, tmp_path / name, changed(**settings)) for name in "ab"]
    runs[1].config = changed(**{"tile_batch": 6} | settings)
    runs[0].config = changed(**settings | {"tile_batch": 64})
    calls = spy(runs[1].model.encoder, "encode_tiles")
    whole, parts = map(gradients, runs)
    assert [len(tiles) for tiles, *_ in calls] == ([5, 5, 5, 1, 5, 5, 5] if "tile_batch" in settings else [6, 6, 4, 6, 6])
    assert any(n.startswith("encoder.clip.visual") for n in whole)
    for name, gradient in whole.items():
        assert float((gradient - parts[name]).norm()) <= 1e-9 * max(float(gradient.norm()), 1e-3), name


def test_where_all_tiles_are_drawn_z_is_what_embed_gives(cohort, tmp_path):
    run = open_run(cohort, tmp_path, changed(tiles=1000, stain_jitter=0.0))
    run.model.eval()
    samples, _ = first_step(run, [0, 3])
    with torch.no_grad():
        fresh = trainer.encode_samples(run, samples, [np.array([0, 3])])
        first, second, rest, _ = trainer.make_bags(run, samples, fresh)
        z = run.model.aggregator(first + second + rest)
    for sample, vector in zip(samples, z.numpy()):
        tiles = run.reader.read(sample.member, np.arange(cohort.members[sample.member].tiles))
        np.testing.assert_allclose(run.model.embed_features([run.model.embed_tiles(tiles)]), vector, atol=2e-3)  # float16 rows


@pytest.mark.parametrize("aggregator", ["residual", "attention"])
def test_the_two_views_are_the_drawn_tiles_and_the_rest_or_halves_where_the_rest_is_less(cohort, tmp_path, monkeypatch, aggregator):
    run = open_run(cohort, tmp_path, replace(changed(view_weight=0.7), model=replace(SMALL.model, aggregator=aggregator)), gate=False)
    M, calls, inner = cohort.members[0].tiles, [], trainer.contrastive_loss
    run.model.eval()
    monkeypatch.setattr(trainer, "contrastive_loss", lambda z, u, *rest: calls.append((z, u, inner(z, u, *rest))) or calls[-1][2])

    def rows(tiles):
        return torch.from_numpy(run.bank.read("s0", tiles)[0]).float()

    def vector(*parts):
        return run.model.aggregator(run.model.aggregator.bag(torch.cat(parts)))

    for drawn, share in ((np.arange(4), 1.0), (np.arange(M - 3), 1.0), (np.arange(6), 0.0), (np.arange(1), 0.0)):
        calls.clear()
        run.config = changed(view_weight=0.7, bank_share=share)
        fresh = rows(np.arange(M))[drawn]
        rest = run.bank.rest("s0", drawn, share, np.random.default_rng(0))
        sample = trainer.SlideSample(0, drawn, None, None, rest)
        tiles = trainer.Fresh(fresh, trainer.nearest_codeword(fresh, run.model.aggregator.codewords), run.model.aggregator.weigh(fresh))
        loss, _, _ = trainer.compute_loss(run, [sample], tiles, [np.array([0])])
        (whole, _, a), (one, other, b) = calls
        others, halved = rows(np.setdiff1d(np.arange(M), drawn)) if share else rows(drawn[:0]), len(drawn) > (M - len(drawn)) * share
        torch.testing.assert_close(whole, vector(fresh, others), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one, vector(fresh[::2] if halved else fresh), rtol=1e-4, atol=1e-5)
        seconds = fresh[1::2] if halved else fresh[:0]
        expected = vector(seconds, others) if len(seconds) + len(others) else one
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)
        assert loss.item() == pytest.approx(a.item() + 0.7 * b.item(), rel=1e-6, abs=1e-6)  # even weights add nothing


def test_drawn_tiles_and_the_others_used_count_once(cohort, tmp_path, monkeypatch):
    run, seen = open_run(cohort, tmp_path, changed(bank_share=0.5, view_weight=0.0), gate=False), []
    monkeypatch.setattr(run.model.aggregator, "forward", lambda bag: seen.append(bag) or torch.ones(len(bag.counts), run.model.joint_dim))
    samples, plan = first_step(run)
    trainer.compute_loss(run, samples, trainer.encode_samples(run, samples, plan), plan)
    used = [np.isin(block_of(np.setdiff1d(np.arange(s.rest.slide.tiles), s.tiles)), s.rest.used).sum() for s in samples]
    assert seen[0].counts.sum(1).tolist() == [len(s.tiles) + n for s, n in zip(samples, used)]


def test_a_step_reads_old_rows_once_and_writes_the_fresh_ones(cohort, tmp_path, monkeypatch, spy):
    run = open_run(cohort, tmp_path, gate=False)
    for m in range(len(cohort)):
        run.bank._open(run.slide(m))  # built
    calls = spy(SlideFile, "gather")
    monkeypatch.setattr(SlideFile, "stream", lambda self: pytest.fail("reads all rows"))
    samples, plan = first_step(run)
    trainer.train_step(run, samples, plan)
    assert [rows.tolist() for _, rows in calls] == [s.rest.tiles.tolist() for s in samples] and all(len(s.tiles) == 4 for s in samples)
    run.step = 7
    assert all((run.bank.rest(run.slide(s.member), s.tiles, 1.0, run.rng()).age == 0).all() for s in samples)


def test_weights_learn_from_drawn_tiles_and_rows_beside_them_and_the_bank_keeps_them(cohort, tmp_path, spy):
    run, calls = open_run(cohort, tmp_path, changed(bank_share=0.5)), spy(trainer, "make_bags")
    torch.nn.init.normal_(run.model.aggregator.gate.score.weight)
    samples, plan = first_step(run)
    assert all(len(s.rest.tiles) > len(s.tiles) == 4 for s in samples)
    trainer.train_step(run, samples, plan)
    assert all(run.model.aggregator.gate.get_parameter(f"{name}.weight").grad.any() for name in ("value", "gate", "score"))
    stored = [run.bank.rest(run.slide(s.member), s.rest.tiles, 1.0, run.rng()).slide.weight[s.rest.tiles] for s in samples]
    np.testing.assert_allclose(np.concatenate(stored), calls[0][2].weights.detach(), rtol=1e-3)
    assert np.ptp(np.concatenate(stored)) > 0.01


def test_uneven_weights_cost_and_the_gate_learns_ten_times_as_fast(cohort, tmp_path, monkeypatch):
    run = open_run(cohort, tmp_path)
    torch.nn.init.normal_(run.model.aggregator.gate.score.weight, std=10)
    run.model.eval()
    samples, plan = first_step(run)
    fresh = trainer.encode_samples(run, samples, plan)
    loss, _, _ = trainer.compute_loss(run, samples, fresh, plan)
    monkeypatch.setattr(trainer, "EVEN", 0.0)
    bare, _, _ = trainer.compute_loss(run, samples, fresh, plan)
    shares = [w.detach() / w.detach().sum() for w in fresh.weights.split([len(s.rest.tiles) for s in samples])]
    apart = [float((share * (share * len(share)).log()).sum()) for share in shares]
    assert loss.item() - bare.item() == pytest.approx(0.1 * np.mean(apart), rel=1e-3) and min(apart) > 0.1
    rates = {p: group["peak"] for group in run.optimizer.param_groups for p in group["params"]}
    aggregator = run.model.aggregator
    assert all(rates[p] == pytest.approx(10 * run.config.train.lr) for p in aggregator.gate.parameters())
    assert rates[aggregator.head.weight] == rates[run.model.logit_scale] == run.config.train.lr


def test_the_codebook_follows_the_features_and_slides_are_assigned_and_weighed_anew(cohort, tmp_path):
    run = open_run(cohort, tmp_path)
    trainer.run_epoch(run)
    before = run.model.aggregator.codewords.clone()
    torch.nn.init.normal_(run.model.aggregator.gate.score.weight)
    trainer.set_codebook(run, refit=True)
    words = run.model.aggregator.codewords
    assert not torch.equal(words, before)
    rows = torch.from_numpy(run.bank.read("s0", np.arange(cohort.members[0].tiles))[0]).float()
    bag = run.model.aggregator.bag(rows)
    sums, counts = sums_of(run.bank, "s0")
    np.testing.assert_allclose(sums, bag.sums[0].detach(), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(counts, bag.counts[0].detach(), rtol=1e-2)  # weights as float16
    assert 1 / len(words) <= trainer.run_epoch(run)["codeword_use"] <= 1


@pytest.mark.parametrize("name", ["logit_scale", "view_scale"])
def test_the_temperature_is_bounded_and_comes_back(cohort, tmp_path, name):
    run = open_run(cohort, tmp_path)
    scale = getattr(run.model, name)
    with torch.no_grad():
        scale.fill_(9.0)
    trainer.train_step(run, *first_step(run))
    assert scale.item() <= np.log(100) + 1e-6 and scale.grad.item() != 0


# texts


def test_a_report_has_one_vector_in_training_and_after(cohort, tmp_path, monkeypatch):
    long = replace(cohort, reports=tuple(" ".join(f"Finding {i} is {r}" for i in range(30)) for r in cohort.reports))
    run = open_run(long, tmp_path, changed(report_part=1.0))
    run.model.eval()
    assert len(run.pieces[0]) > 1
    monkeypatch.setattr(trainer, "PIECES", 100)
    in_training = trainer.report_vectors(run, first_step(run, [0])[0]).detach().numpy()[0]
    np.testing.assert_allclose(in_training, run.model.embed_text(long.reports[cohort.members[0].report]), atol=1e-5)


def test_leak_words_are_masked_out_of_what_is_learnt_from(cohort, tmp_path):
    run = open_run(cohort, tmp_path, changed(leak_words="finding"))
    assert not any("finding" in piece.lower() for pieces in run.pieces for piece in pieces) and "8 of 8 reports" in " ".join(run.notes)
    assert all("Finding" in report for report in cohort.reports)


def test_a_long_report_costs_a_tower_that_learns_no_more_than_its_cap(cohort, tmp_path, spy):
    long = replace(cohort, reports=tuple(" ".join(f"Finding {i}." for i in range(400)) + r for r in cohort.reports))
    run = open_run(long, tmp_path)
    read = spy(run.model.text, "encode")
    samples = first_step(run, [0, 2, 3])[0]
    for run.epoch in (0, 1):
        trainer.report_vectors(run, samples)
    assert [len(texts) for (texts,) in read] == [3 * trainer.PIECES] * 2 and read[0] != read[1], "drawn anew each time"


# the loop


def test_it_learns(tmp_path):
    """Twelve slides whose reports say what their tiles show: retrieval far above chance within a minute."""
    rng, folder = np.random.default_rng(0), tmp_path / "features"
    folder.mkdir()
    kinds = rng.normal(size=(3, 16))
    for i in range(12):
        tiles = rng.normal(size=(60, 16)) + 1.5 * kinds[i % 3] + 0.5 * rng.normal(size=16)
        torch.save(torch.from_numpy(tiles).float(), folder / f"s{i}.pt")
    np.savez(tmp_path / "v.npz", **{f"s{i}": np.eye(12, dtype=np.float32)[i] for i in range(12)})
    cohort = Cohort.of_features(find_features(folder)).with_reports(None, tmp_path / "v.npz")
    pretrain(cohort, tmp_path / "run", changed(FROZEN, epochs=60, batch=12, lr=3e-3, report_part=1.0))
    rows = rows_of(tmp_path / "run")
    assert float(rows[-1]["batch_recall@1"]) >= 0.75 > float(rows[0]["batch_recall@1"])
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])


def test_training_writes_all_files_and_its_model_holds_no_word_of_a_report(cohort, tmp_path):
    marked = replace(cohort, reports=tuple(f"Xylophonoma {r} of patient." for r in cohort.reports))
    marked = marked.subset([replace(m, patient_id=f"Quibblesworth-{m.patient_id}") for m in marked.members])
    pretrain(marked, tmp_path / "run", SMALL)
    for column in ("loss", "row_cosine", "row_age", "grad_encoder", "batch_recall@1", "effective_rank", "temperature"):
        assert np.isfinite(float(rows_of(tmp_path / "run")[-1][column])), column
    files = "config.toml curves.png checkpoint.pt bank/bank.json report.html model/config.json model/open_clip/open_clip_config.json"
    for name in files.split():
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert RunConfig.load(tmp_path / "run" / "config.toml") == SMALL
    for path in (p for p in (tmp_path / "run" / "model").rglob("*") if p.is_file()):
        assert not {word for word in (b"ylophonoma", b"uibblesworth") if word in path.read_bytes()}, path
    assert "8 training slides, which the model has seen" in (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "8 slides, 7 patients" in card and "tiles of 64 px at 2 µm/px, encoded by dreslcl-tiny" in card


@pytest.mark.parametrize("aggregator", ["residual", "attention", "mean-mlp"])
def test_features_made_elsewhere_go_from_pretraining_to_embeddings(features, work, tmp_path, aggregator):
    cohort = Cohort.of_features(find_features(features), patients=work / "reports.csv")
    settings = replace(FROZEN, model=replace(SMALL.model, aggregator=aggregator))
    model = pretrain(cohort.with_reports(None, tmp_path / "vectors.npz"), tmp_path / "run", settings)
    result = embed(cohort, tmp_path / "emb", model=model)
    assert result.vectors.shape == (8, 512) and all(hashed(m.slide_id, result.salt) in result.seen for m in cohort.members)
    with pytest.raises(DreslclError, match="trained on features, so it cannot embed pixels"):
        embed(replace(cohort, work=tmp_path), tmp_path / "other", model=model)


def test_excluded_reports_do_not_move_the_text_centre(work, features, tmp_path):
    arrays, centres = dict(np.load(tmp_path / "vectors.npz")), []
    np.savez(tmp_path / "shifted.npz", **{k: v + 100 * (k in ("s6", "s7")) for k, v in arrays.items()})
    for name in ("vectors", "shifted"):
        kept, _ = Cohort.load(work).with_reports(None, tmp_path / f"{name}.npz").split("split=val", work / "reports.csv")
        centres.append(open_run(kept, tmp_path / name).model.text_centre)
    torch.testing.assert_close(*centres)


def test_window_sampling_leaves_no_row_older_than_a_round(cohort, tmp_path):
    run, rounds = open_run(cohort, tmp_path, changed(sampling="window", tiles=7)), -(-cohort.members[0].tiles // 7)
    for _ in range(rounds + 1):
        trainer.run_epoch(run)
        run.epoch += 1
    for member in cohort.members:
        rest = run.bank.rest(member.slide_id, np.arange(member.tiles), 1.0, run.rng())
        assert run.step - rest.age.min() <= (rounds + 1) * run.steps_per_epoch


def test_the_statistics_of_the_finished_model_are_those_of_all_slides(cohort, tmp_path):
    run = open_run(cohort, tmp_path)
    trainer.end_epoch(run, trainer.run_epoch(run))
    means = np.stack([run.bank.read(run.slide(m), np.arange(cohort.members[m].tiles))[0].astype(np.float64).mean(0) for m in range(8)])
    np.testing.assert_allclose(run.model.aggregator.centre, means.mean(0), atol=1e-5)


# going on


@pytest.mark.parametrize("encoder, aggregator", [("learns", "residual"), ("rests", "mean-mlp")])
def test_a_run_goes_on_after_its_last_whole_epoch_as_if_it_had_not_stopped(cohort, tmp_path, encoder, aggregator):
    settings = replace(SMALL if encoder == "learns" else FROZEN, model=replace(SMALL.model, aggregator=aggregator))
    pretrain(cohort, tmp_path / "whole", settings)
    run = open_run(cohort, tmp_path / "cut", settings)
    settings.save(tmp_path / "cut" / "config.toml")
    trainer.save_checkpoint(run)
    trainer.end_epoch(run, trainer.run_epoch(run))
    if aggregator == "mean-mlp":  # killed in an epoch; what this wrote into the bank (rows, weights) is newer, and stays
        trainer.run_epoch(run)
    pretrain(cohort, tmp_path / "cut", settings)
    assert learnt(tmp_path / "whole") == learnt(tmp_path / "cut")
    before = (tmp_path / "cut" / "checkpoint.pt").read_bytes()
    pretrain(cohort, tmp_path / "cut", settings)  # done already
    assert (tmp_path / "cut" / "checkpoint.pt").read_bytes() == before
    pretrain(cohort, tmp_path / "other", changed(settings, seed=1))
    assert learnt(tmp_path / "other") != learnt(tmp_path / "whole")


def test_what_may_change_is_applied_and_said_and_the_rest_is_refused(cohort, tmp_path, caplog):
    pretrain(cohort, tmp_path, SMALL)
    caplog.set_level("INFO")
    pretrain(cohort, tmp_path, changed(epochs=3, lr=1e-4, weight_decay=0.5))
    assert "changed: epochs 2 → 3, lr 0.0003 → 0.0001, weight_decay 0.05 → 0.5" in caplog.text
    state = max(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"], key=lambda g: g["weight_decay"])
    assert state["peak"] == 1e-4 and state["weight_decay"] == 0.5 and float(rows_of(tmp_path)[-1]["lr"]) < 1e-4
    for settings, why in (
        (changed(batch=8, epochs=3), r"other settings \(.*batch 4 → 8.*the same train\.batch"),
        (replace(changed(epochs=3), model=replace(SMALL.model, depth=2)), "depth 1 → 2"),
        (changed(epochs=1), "3 epochs are done; --epochs 1 would go back"),
    ):
        with pytest.raises(StoreError, match=why):
            pretrain(cohort, tmp_path, settings)


def test_the_schedule_goes_by_share_of_the_training(cohort, tmp_path):
    run, rates = open_run(cohort, tmp_path), []
    for position in (0.0, 0.05, 0.1, 0.55, 0.99):
        trainer.set_learning_rates(run, position, 0.01)
        rates.append(run.optimizer.param_groups[0]["lr"] / run.config.train.lr)
    assert rates == pytest.approx([0.1, 0.6, 1.0, 0.5, 0.0], abs=1e-3)


def test_a_grown_cohort_keeps_its_bank_and_fills_what_is_new(cohort, tmp_path, spy):
    pretrain(cohort.subset(cohort.members[:6]), tmp_path, changed(epochs=1))
    filled = spy(trainer.MemoryBank, "fill")
    pretrain(cohort.subset(cohort.members[1:]), tmp_path, changed(epochs=2))
    assert [slide for _, slide, *_ in filled] == ["s6", "s7"]


# faults


def test_one_damaged_slide_costs_one_slide(cohort, work, tmp_path, monkeypatch):
    kept, held_out = cohort.split("split=val", work / "reports.csv")
    read = trainer.TileReader.read

    def damaged(self, member, index, *out):
        if self.cohort.members[member].slide_id in ("s3", "s7") or (self.cohort.members[member].slide_id == "s4" and len(index) == 4):
            raise SlideError("stored tile 5 cannot be decoded")
        return read(self, member, index, *out)

    monkeypatch.setattr(trainer.TileReader, "read", damaged)
    monkeypatch.setattr(trainer, "FAILED_SHARE", 0.2)
    pretrain(kept, tmp_path, changed(tiles=4), held_out=held_out)
    page = (tmp_path / "report.html").read_text()
    assert all(f"{slide} failed: stored tile 5 cannot be decoded" in page for slide in ("s3", "s4", "s7"))
    assert not (tmp_path / "bank" / "s3.bank").exists() and (tmp_path / "bank" / "s4.bank").exists()
    with pytest.raises(SlideError, match="none of 1 slides to rank by retrieval could be read"):
        pretrain(kept, tmp_path / "s7", changed(tiles=4), held_out=held_out.subset([m for m in held_out.members if m.slide_id == "s7"]))
    monkeypatch.setattr(trainer, "FAILED_SHARE", 0.1)
    with pytest.raises(DreslclError, match="1 of 6 slides cannot be read; s3: stored tile 5"):
        pretrain(kept, tmp_path / "other", SMALL)


@pytest.mark.parametrize(
    "members, reports, ranks, rate, message",
    [
        (2, 8, 1, 1e-3, "at least 2 patients"),
        (8, 1, 1, 1e-3, "two reports"),
        (8, 8, 3, 1e-3, "multiple of the 3 ranks"),
        (8, 8, 1, 1e-5, "stays there at --encoder-lr 1e-05"),
    ],
)
def test_what_cannot_learn_is_refused_before_work_is_done(cohort, tmp_path, members, reports, ranks, rate, message):
    few = cohort.subset(cohort.members[:members])  # s0 and s1 are of one patient
    few = replace(few, members=tuple(replace(m, report=min(m.report, reports - 1)) for m in few.members), reports=few.reports[:reports])
    with pytest.raises(ConfigError, match=message):
        trainer.open_run(few, Cohort(()), changed(encoder_lr=rate), tmp_path / "run", Ranks(0, ranks))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_with_step_and_slides_and_keeps_nothing_of_it(cohort, tmp_path):
    run = open_run(cohort, tmp_path)
    rows = [run.bank.read(f"s{i}", np.arange(9))[0].copy() for i in range(8)]
    with torch.no_grad():
        run.model.aggregator.head.bias.fill_(float("nan"))
    with pytest.raises(DreslclError, match=r"the loss is not finite at step 0 \(slides s\d.*lower --lr"):
        trainer.run_epoch(run)
    assert all((run.bank.read(f"s{i}", np.arange(9))[0] == rows[i]).all() for i in range(8))


def test_a_random_tile_encoder_that_learns_while_tiles_are_left_out_is_warned_of(cohort, tmp_path, caplog):
    for settings, warned in ((changed(bank_share=0.5), 1), (SMALL, 0), (changed(FROZEN, bank_share=0.5), 0)):
        caplog.clear()
        trainer.open_run(cohort, Cohort(()), settings, tmp_path, Ranks())
        assert caplog.text.count("does not begin to learn") == warned


def test_a_run_can_start_from_the_encoder_and_aggregator_of_an_earlier_one_and_remembers_whom_that_saw(cohort, tmp_path):
    first, second = cohort.subset(cohort.members[:4]), cohort.subset(cohort.members[4:])
    model = pretrain(first, tmp_path / "first", SMALL)
    init = replace(SMALL, encoder=replace(SMALL.encoder, init=str(model)))
    earlier, run = DRESLCL.load(model), open_run(second, tmp_path / "second", init)
    assert run.model.encoder.fingerprint() == earlier.encoder.fingerprint()
    assert torch.equal(run.model.aggregator.head.weight, earlier.aggregator.head.weight)
    assert not torch.equal(run.model.aggregator.codewords, earlier.aggregator.codewords)  # K-means went on from them
    about = run.model.about
    assert {hashed(m.patient_id, about["salt"]) for m in cohort.members} <= set(about["seen"])
    for other, said in (
        (replace(init, encoder=replace(init.encoder, name="ViT-S-16")), "leave --encoder"),
        (replace(init, model=replace(init.model, width=32)), "width 16, here 32"),
        (replace(init, encoder=replace(init.encoder, text="lsa")), "other widths|too few"),
    ):
        with pytest.raises(ConfigError, match=said):
            trainer.open_run(second, Cohort(()), other, tmp_path / "third", Ranks())


def test_few_points_of_a_step_wait_for_the_device(cohort, tmp_path, monkeypatch):
    """On a GPU each of these waits; the first step warms up."""
    run, waits = open_run(cohort, tmp_path), []
    trainer.train_step(run, *first_step(run))
    samples, plan = first_step(run)
    for name in ("cpu", "item", "tolist", "numpy", "__float__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _o=original, _n=name, **k: waits.append(_n) or _o(self, *a, **k))
    trainer.train_step(run, samples, plan)
    monkeypatch.undo()
    of_the_bank = 3 * len(samples)  # its arrays never leave the CPU
    assert waits.count("tolist") == 1 and waits.count("cpu") <= 3 and len(waits) <= 10 + of_the_bank, waits


def test_a_step_runs_on_a_fake_gpu_as_far_as_that_goes(cohort, tmp_path):
    """Shapes and devices of a whole step but `backward`, for which autograd asks for a real GPU."""
    run = open_run(cohort, tmp_path, changed(tile_batch=6))
    samples, plan = first_step(run)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run.device = torch.device("cuda")
        run.model.to("cuda")
        run.optimizer = trainer.make_optimizer(run)
        fresh = trainer.encode_samples(run, [replace(s, pixels=s.pixels.to("cuda")) for s in samples], plan)
        loss, measured, z = trainer.compute_loss(run, samples, fresh, plan)
        assert all(value.is_cuda for value in (*vars(fresh).values(), loss, z, *measured.values()))
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        assert torch.nn.utils.clip_grad_norm_(parameters, 1.0).is_cuda
        run.optimizer.step()


@pytest.mark.gpu
def test_on_a_gpu_a_run_in_bf16_trains_and_embeds(cohort, tmp_path):
    settings = changed(precision="bf16", epochs=3)
    model = DRESLCL.load(pretrain(cohort, tmp_path / "run", settings)).to("cuda")
    rows = rows_of(tmp_path / "run")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    on_cpu, pixels = DRESLCL.load(tmp_path / "run" / "model"), np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    assert np.abs(model.embed_tiles(pixels) - on_cpu.embed_tiles(pixels)).max() < 0.01


@pytest.mark.gpu
def test_on_a_gpu_pixels_come_pinned_and_a_step_waits_once(cohort, tmp_path):
    run = open_run(cohort, tmp_path)
    trainer.train_step(run, *first_step(run))
    samples, plan = first_step(run)
    assert all(s.pixels.is_cuda for s in samples)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            trainer.train_step(run, samples, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 10


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_by_nccl(cohort, work, tmp_path):
    SMALL.save(tmp_path / "settings.toml")
    torchrun(2, RANKS, work, tmp_path / "two", gpus="0,1")
    assert all(np.isfinite(float(row["loss"])) for row in rows_of(tmp_path / "two"))


def test_slow_reading_is_named_as_the_limit_with_what_helps(cohort, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    read = trainer.TileReader.read
    monkeypatch.setattr(trainer.TileReader, "read", lambda *args: time.sleep(0.2) or read(*args))
    pretrain(cohort, tmp_path / "run", SMALL, dry_run=True)
    assert not (tmp_path / "run").exists() and "steps per epoch; the bank takes" in caplog.text and " an epoch; " in caplog.text
    caplog.clear()
    pretrain(cohort, tmp_path / "run", changed(epochs=1))
    last = {key: float(value) for key, value in rows_of(tmp_path / "run")[-1].items()}
    assert last["time/waiting"] > 0.5 and last["time/reading"] > 0.5
    assert last["time/waiting"] + last["time/encoder"] == pytest.approx(1)
    assert f"waiting for tiles {last['time/waiting']:.0%}, reading kept its threads busy" in caplog.text
    assert f"waiting for tiles {last['time/waiting']:.0%}" in (tmp_path / "run/report.html").read_text()
    forecast, epoch = (record.message for record in caplog.records if "the limit is" in record.message)
    for said in (forecast, epoch):
        assert re.search(r"the limit is reading: give it (1 more core|([2-9]|[1-9]\d+) more cores), or --pack$", said)
    run = open_run(cohort, tmp_path / "other")
    assert trainer.name_limit(run, 4.1, 1.0).startswith("reading: give it 4 more cores")
    assert trainer.name_limit(run, 0.9, 1.0) == "the encoder"


# ranks


def test_effective_rank_counts_directions():
    assert effective_rank(torch.eye(3).repeat(5, 1)) == pytest.approx(2.0, abs=1e-4)  # three points span a plane
    assert effective_rank(torch.ones(6, 3)) == pytest.approx(1.0, abs=1e-4)


def test_gradients_of_any_memory_layout_are_summed_over_ranks_and_none_stays_none(monkeypatch):
    weights = [torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)), torch.nn.Parameter(torch.randn(5))]
    for p in weights:
        p.grad = torch.randn_like(p)
    idle = torch.nn.Parameter(torch.randn(2))
    before = [p.grad.clone() for p in weights]
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.mul_(2))
    Ranks(0, 2).sum_gradients([*weights, idle])
    assert all(torch.equal(p.grad, 2 * b) for p, b in zip(weights, before)) and idle.grad is None


RANKS = """
import sys
from pathlib import Path
from dreslcl.cohort import Cohort
from dreslcl.config import RunConfig
from dreslcl.trainer import pretrain
work, out = Path(sys.argv[1]), Path(sys.argv[2])
pretrain(Cohort.load(work).with_reports(work / "reports.csv"), out, RunConfig.load(out.parent / "settings.toml"))
"""


@pytest.mark.parametrize("settings", [SMALL, FROZEN], ids=["encoder", "frozen"])
def test_two_ranks_train_as_one_process_with_the_same_batch(cohort, work, tmp_path, settings, monkeypatch):
    settings.save(tmp_path / "settings.toml")
    torchrun(2, RANKS, work, tmp_path / "two")
    plan_steps = trainer.plan_steps

    def plan(run):  # the slides dealt as over two ranks: the batches are the same
        two = replace(run, group=Ranks(0, 2), rank_of=trainer.deal_patients(run.cohort.members, 2))
        return [[np.concatenate(step)] for step in plan_steps(two)]

    monkeypatch.setattr(trainer, "plan_steps", plan)
    pretrain(cohort, tmp_path / "one", settings)
    one, two = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("one", "two"))
    for a, b in zip(one["rows"], two["rows"]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    flat = [torch.cat([v.flatten() for v in run["model"].values() if v.is_floating_point()]) for run in (one, two)]
    # as one vector: Adam turns rounding noise of gradients that are exactly zero in theory (key biases) into small steps
    assert float((flat[0] - flat[1]).norm()) <= 1e-4 * float(flat[0].norm())
    replace(settings, train=replace(settings.train, epochs=3)).save(tmp_path / "settings.toml")
    torchrun(1, RANKS, work, tmp_path / "two")  # going on with another number of ranks
    assert torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["epoch"] == 3
