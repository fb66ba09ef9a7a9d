"""The training loop on a cohort of tiny scans: gradients, ranks, resume, sampling, telemetry."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dreslcl import trainer as trainer_module
from dreslcl.cohort import Cohort, deal_patients, draw_tiles, plan_epoch, window_tiles
from dreslcl.common import ConfigError, DreslclError, StoreError
from dreslcl.config import EncoderConfig, ModelConfig, RunConfig, TrainConfig
from dreslcl.distributed import Ranks
from dreslcl.residual import refreshed_residuals
from dreslcl.trainer import Trainer, effective_rank, pretrain

SMALL = RunConfig(
    EncoderConfig(),
    ModelConfig(codewords=4, width=16, heads=2, depth=1, dropout=0.0),
    TrainConfig(epochs=2, batch=4, tiles=4, tile_batch=64, warmup=0.0, encoder_lr=1e-3, report_part=0.5),
)


def train(cohort, out, settings=SMALL, **changes):
    pretrain(cohort, out, replace(settings, train=replace(settings.train, **changes)))
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def trainer(cohort, out, settings=SMALL, **changes) -> Trainer:
    made = Trainer(cohort, Cohort(()), replace(settings, train=replace(settings.train, **changes)), out, Ranks())
    made.encode_reports()
    made.make_optimizer()
    made.make_bank()
    return made


def test_a_random_tile_encoder_that_learns_while_rows_are_left_out_is_warned_of(cohort, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("dreslcl.trainer.log.warning", lambda text, *_: said.append(text))
    for changes, warned in (({"stale_dropout": 0.5}, 1), ({"stale_dropout": 0.0}, 0), ({"bank": False}, 0), ({"freeze_epochs": 1}, 0)):
        said.clear()
        Trainer(cohort, Cohort(()), replace(SMALL, train=replace(SMALL.train, **changes)), tmp_path, Ranks())
        assert sum("does not begin to learn" in text for text in said) == warned, changes


def gradients(made: Trainer) -> dict[str, torch.Tensor]:
    """Gradients of the first step's loss, by parameter name (the optimiser is kept from moving)."""
    made.optimizer.step = lambda *_: None
    plan = made.plan()[0]
    visits = [made._visit(int(m)) for m in plan[0]]
    made.model.train()
    made.train_step(visits, [made.reader.read(v.member, v.tiles) for v in visits], plan)
    return {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}


@pytest.fixture
def two_threads():
    """On one thread torch takes other convolutions for batches of other sizes, which round differently: 4e-5."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_gradient_caching_gives_the_gradients_of_one_big_batch(cohort, tmp_path):
    whole = gradients(trainer(cohort, tmp_path / "a", clip_grad=0.0))
    parts = gradients(trainer(cohort, tmp_path / "b", clip_grad=0.0, tile_batch=4))  # of odd sizes convolutions round differently: 4e-5
    assert any(n.startswith("encoder.clip.visual") for n in whole)
    for name, gradient in whole.items():
        scale = max(float(gradient.norm()), 1e-3)
        assert float((gradient - parts[name]).norm()) <= 1e-4 * scale, (
            name
        )  # float32 convolutions of other batch sizes round differently from processor to processor


def test_the_same_seed_gives_the_same_metrics_and_another_seed_does_not(cohort, tmp_path):
    first = train(cohort, tmp_path / "a")
    assert first == train(cohort, tmp_path / "b")
    assert first != train(cohort, tmp_path / "c", seed=1)


def test_training_moves_the_encoder_and_writes_all_files(cohort, tmp_path):
    rows = train(cohort, tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for column in ("loss", "row_cosine", "row_age", "grad_encoder", "batch_recall@1", "effective_rank", "temperature"):
        assert np.isfinite(float(rows[-1][column])), column
    assert 0 < float(rows[0]["row_cosine"]) < 0.99999
    for name in (
        "config.toml",
        "curves.png",
        "checkpoint.pt",
        "bank/bank.json",
        "model/config.json",
        "model/open_clip/open_clip_config.json",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert RunConfig.load(tmp_path / "run" / "config.toml") == SMALL


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "window"},
        {"bank": False},
        {"bank_tiles": 3, "stale_dropout": 0.3},
        {"gradient_scale": "full", "refresh": 3, "refresh_every": 1},
        {"loss": "siglip", "codebook_refit": 1},
        {"view_weight": 0.5, "label_smoothing": 0.1, "report_part": 1.0},
        {"freeze_epochs": 1, "stale_dropout": 0.2},
        {"precision": "bf16", "augment": False},
    ],
    ids=str,
)
def test_every_way_to_train_runs(cohort, tmp_path, changes):
    rows = train(cohort, tmp_path, **changes)
    assert len(rows) == 2 and all(np.isfinite(float(row["loss"])) for row in rows)


def test_a_resting_encoder_keeps_its_weights_and_reads_no_pixels(cohort, tmp_path, monkeypatch):
    settings = replace(SMALL, encoder=EncoderConfig(tune="none"))
    made = trainer(cohort, tmp_path, settings)
    before = made.encoder.fingerprint()
    monkeypatch.setattr(made.reader, "read", lambda *_: pytest.fail("pixels were read"))
    values = made.run_epoch()
    assert made.encoder.fingerprint() == before and "grad_encoder" not in values


def test_resuming_goes_on_after_the_last_whole_epoch(cohort, tmp_path):
    made = trainer(cohort, tmp_path, epochs=2)
    made.save_checkpoint()
    made.end_epoch(made.run_epoch())  # killed here
    del made
    with pytest.raises(StoreError, match="--resume"):
        pretrain(cohort, tmp_path, SMALL)
    pretrain(cohort, tmp_path, SMALL, resume=True)
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_another_encoder_is_refused_on_resume(cohort, tmp_path):
    train(cohort, tmp_path, epochs=1)
    with pytest.raises(StoreError, match="encoder"):
        pretrain(cohort, tmp_path, replace(SMALL, train=replace(SMALL.train, seed=5)), resume=True)


def test_a_loss_that_is_not_finite_stops_with_step_and_slides(cohort, tmp_path):
    made = trainer(cohort, tmp_path)
    with torch.no_grad():
        made.model.aggregator.head.bias.fill_(float("nan"))
    with pytest.raises(DreslclError, match=r"step 0 \(slides s\d"):
        made.run_epoch()


def test_window_sampling_leaves_no_row_older_than_a_round(cohort, tmp_path):
    made = trainer(cohort, tmp_path, sampling="window", tiles=7)
    tiles = cohort.members[0].tiles
    rounds = -(-tiles // 7)
    for _ in range(rounds + 1):
        made.run_epoch()
        made.epoch += 1
    for member in cohort.members:
        oldest = made.bank.oldest(member.slide_id, 1)
        shard, _, rows = made.bank._find(member.slide_id)
        assert made.step - shard.step[rows][oldest[0]] <= rounds * made.steps_per_epoch + made.steps_per_epoch
    first = np.concatenate([window_tiles(np.arange(tiles), 7, visit) for visit in range(rounds)])
    assert set(first) == set(range(tiles))


def test_a_batch_never_holds_two_slides_of_one_patient(cohort):
    for seed in range(20):
        batches = plan_epoch(cohort.members, range(8), 3, np.random.default_rng(seed))
        assert sorted(np.concatenate(batches)) == list(range(8))
        for batch in batches:
            patients = [cohort.members[i].patient_id for i in batch]
            assert len(set(patients)) == len(patients)
    surplus = plan_epoch(cohort.members, range(8), 1, np.random.default_rng(0))
    assert len(surplus[0]) == 7


def test_a_patients_slides_lie_in_one_shard(cohort):
    shards = deal_patients(cohort.members, 3)
    assert shards[0] == shards[1] and set(shards) == {0, 1, 2}


def test_draws_are_distinct_and_within_the_slide():
    drawn = draw_tiles(10, 4, np.random.default_rng(0))
    assert len(set(drawn)) == 4 and drawn.max() < 10
    assert list(draw_tiles(3, 8, np.random.default_rng(0))) == [0, 1, 2]


def test_effective_rank_counts_directions():
    vectors = torch.eye(3).repeat(5, 1)
    assert effective_rank(vectors) == pytest.approx(2.0, abs=1e-4)  # three points span a plane
    assert effective_rank(torch.ones(6, 3)) == pytest.approx(1.0, abs=1e-4)


def test_held_out_retrieval_is_measured_and_the_best_epoch_is_kept(cohort, work, tmp_path):
    kept, held_out = cohort.split("split=val", work / "reports.csv")
    assert {m.slide_id for m in held_out.members} == {"s6", "s7"}
    pretrain(kept, tmp_path, SMALL, held_out=held_out)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["held_out_recall@5"]) == 1.0  # two slides
    assert (tmp_path / "model" / "config.json").exists()


def test_batch_must_be_a_multiple_of_the_shards(cohort, tmp_path):
    with pytest.raises(ConfigError, match="multiple"):
        pretrain(cohort, tmp_path, SMALL, shards=3)


TWO_RANKS = """
import sys
from pathlib import Path
from dreslcl.cohort import Cohort
from dreslcl.config import RunConfig
from dreslcl.trainer import pretrain
work, out = Path(sys.argv[1]), Path(sys.argv[2])
cohort = Cohort.load(work).with_reports(work / "reports.csv")
pretrain(cohort, out, RunConfig.load(out.parent / "settings.toml"), shards=2, resume=len(sys.argv) > 3)
"""


def torchrun(script: Path, ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_train_as_one_process_with_the_same_batch(cohort, work, tmp_path):
    settings = replace(SMALL, train=replace(SMALL.train, clip_grad=0.5))
    settings.save(tmp_path / "settings.toml")
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    torchrun(script, 2, str(work), str(tmp_path / "two"))
    pretrain(cohort, tmp_path / "one", settings, shards=2)
    one, two = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("one", "two"))
    for a, b in zip(one["rows"], two["rows"]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    flat = [torch.cat([v.flatten() for v in run["model"].values() if v.is_floating_point()]) for run in (one, two)]
    # as one vector: Adam turns rounding noise of gradients that are exactly zero in theory (key biases) into small steps
    assert float((flat[0] - flat[1]).norm()) <= 1e-5 * float(flat[0].norm())
    # and going on with another number of ranks
    replace(settings, train=replace(settings.train, epochs=3)).save(tmp_path / "settings.toml")
    torchrun(script, 1, str(work), str(tmp_path / "two"), "resume")
    assert torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["epoch"] == 3


def test_a_long_report_costs_a_tuned_text_tower_no_more_than_its_cap(cohort, tmp_path, monkeypatch):
    long = replace(cohort, reports=tuple(" ".join(f"Finding {i}." for i in range(40)) + r for r in cohort.reports))
    made = trainer(long, tmp_path, report_windows=3)
    read = []
    encode = made.encoder.encode_texts
    monkeypatch.setattr(made.encoder, "encode_texts", lambda texts: read.append(texts) or encode(texts))
    visits = [made._visit(m) for m in range(4)]
    made._report_vectors(visits)
    made.epoch = 1
    made._report_vectors(visits)
    assert [len(texts) for texts in read] == [4 * 3, 4 * 3] and read[0] != read[1], "drawn anew each time"
    free = trainer(long, tmp_path / "b", report_windows=0)
    monkeypatch.setattr(free.encoder, "encode_texts", lambda texts: read.append(texts) or encode(texts))
    free._report_vectors(visits)
    assert len(read[-1]) == sum(round(len(free.pieces[cohort.members[v.member].report]) * 0.5) for v in visits) > 60


def test_a_frozen_tower_gives_a_report_the_same_vector_in_training_and_after(cohort, tmp_path):
    long = replace(cohort, reports=tuple(" ".join(f"Finding {i} is {r}" for i in range(9)) for r in cohort.reports))
    frozen = replace(SMALL, encoder=EncoderConfig(text="frozen"))
    made = trainer(long, tmp_path, frozen, report_part=1.0)
    assert len(made.pieces[0]) > 1 and not made.tune_text
    made.model.eval()
    in_training = made._report_vectors([made._visit(0)]).detach().numpy()[0]
    np.testing.assert_allclose(in_training, made.model.embed_text(long.reports[cohort.members[0].report]), atol=1e-5)


def test_gradient_caching_encodes_all_but_the_last_micro_batch_twice(cohort, tmp_path, monkeypatch):
    made = trainer(cohort, tmp_path, tile_batch=6)  # 16 tiles: 6, 6 and 4
    sizes = []
    encode = made.encoder.encode_tiles
    monkeypatch.setattr(made.encoder, "encode_tiles", lambda tiles, views: sizes.append(len(tiles)) or encode(tiles, views))
    gradients(made)
    assert sizes == [6, 6, 4, 6, 6]


def test_the_two_views_of_a_slide_are_its_drawn_tiles_and_all_its_others(cohort, tmp_path):
    made = trainer(cohort, tmp_path)
    made.model.eval()
    slide, T = made._id(0), SMALL.train.tiles
    M, rng = made.bank.tiles(slide), np.random.default_rng(0)

    def vector(*parts) -> torch.Tensor:
        rows = torch.cat([torch.from_numpy(made.bank.gather(slide, p)).float() if isinstance(p, np.ndarray) else p for p in parts])
        return made.model.aggregator(*refreshed_residuals(None, [slide], [np.arange(len(rows))], rows, made.model.aggregator.codewords))

    def views(index: np.ndarray) -> tuple[torch.Tensor, ...]:
        fresh = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(len(index), made.model.dim))).float(), dim=1)
        return fresh, *made._two_views([slide], [index], fresh)

    drawn = rng.permutation(M)[:T]
    fresh, one, other = views(drawn)
    assert 2 * T < M
    torch.testing.assert_close(one, vector(fresh))
    torch.testing.assert_close(other, vector(np.setdiff1d(np.arange(M), drawn)), rtol=1e-4, atol=1e-5)
    drawn = rng.permutation(M)[: M - 3]  # too few others: every second drawn tile joins them
    fresh, one, other = views(drawn)
    torch.testing.assert_close(one, vector(fresh[::2]))
    torch.testing.assert_close(other, vector(fresh[1::2], np.setdiff1d(np.arange(M), drawn)), rtol=1e-4, atol=1e-5)
    made.train = replace(made.train, bank=False)
    fresh, one, other = views(drawn[:1])  # nothing is left for the other part
    torch.testing.assert_close(one, other)


def test_with_views_the_loss_is_report_to_slide_and_view_to_view(cohort, tmp_path, monkeypatch):
    made, calls = trainer(cohort, tmp_path, view_weight=0.7), []
    inner = trainer_module.contrastive_loss

    def recorded(z, u, reports, *rest, **options):
        calls.append((z.detach(), u.detach(), reports, inner(z, u, reports, *rest, **options).item()))
        return inner(z, u, reports, *rest, **options)

    monkeypatch.setattr(trainer_module, "contrastive_loss", recorded)
    plan = made.plan()[0]
    visits = [made._visit(int(m)) for m in plan[0]]
    pixels = list(made.reader.stream([(v.member, v.tiles) for v in visits], ahead=2))
    values, z = made.train_step(visits, pixels, plan)
    (whole, _, _, a), (one, other, each, b) = calls
    assert (whole == z).all() and not torch.allclose(one, whole) and not torch.allclose(one, other)
    assert each.tolist() == list(range(len(z)))
    assert values["loss"] == pytest.approx(a + 0.7 * b, rel=1e-6)


def test_of_a_resting_encoder_one_view_is_half_of_the_bank_rows_and_slides_stay_whole(cohort, tmp_path):
    frozen = replace(SMALL, encoder=EncoderConfig(tune="none"))
    plain, views = (trainer(cohort, tmp_path / str(w), frozen, view_weight=w) for w in (0.0, 1.0))
    slides, visits = [plain._id(0)], [views._visit(0)]
    (index,), fresh = views._from_bank(slides, visits)
    assert len(fresh) == len(index) == views.bank.tiles(slides[0]) // 2
    vectors = [made._slide_vectors(visits, *made._from_bank(slides, visits), [1]) for made in (plain, views)]
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-5)


def test_gradients_of_any_memory_layout_are_summed_over_ranks(monkeypatch):
    weights = [torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)), torch.nn.Parameter(torch.randn(5))]
    for p in weights:
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in weights]
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.mul_(2))
    Ranks(0, 2).sum_gradients(weights)
    assert all(torch.equal(p.grad, 2 * b) for p, b in zip(weights, before))


KILLED = """
import os, signal, sys
from pathlib import Path
from dreslcl.cohort import Cohort
from dreslcl.config import RunConfig
from dreslcl.trainer import Trainer, pretrain
work, out, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
step = Trainer.train_step
def train_step(self, *arguments):
    result = step(self, *arguments)
    if self.step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
Trainer.train_step = train_step
reports = work / "reports.csv"
kept, held_out = Cohort.load(work / "work", patients=reports).with_reports(reports).split("split=test", reports)
pretrain(kept, out, RunConfig.load(out.with_suffix(".toml")), held_out=held_out, resume=True)
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_an_epoch_ends_within_seed_noise(tmp_path):
    """Three seeds: SIGKILL in epoch 7 of 12, after the bank took in two of its three steps; then resumed to the end."""
    from dreslcl.demo import SETTINGS, TILES, write_cohort
    from dreslcl.tiles import tile_slides

    write_cohort(tmp_path, slides=40, seed=0)
    tile_slides(tmp_path / "slides", tmp_path / "work", TILES)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def run(name: str, seed: int, kill_at: int) -> int:
        changed = replace(SETTINGS.train, epochs=12, batch=8, seed=seed)
        replace(SETTINGS, train=changed).save(tmp_path / f"{name}.toml")
        return subprocess.run([sys.executable, str(script), str(tmp_path), str(tmp_path / name), str(kill_at)], timeout=900).returncode

    metric, undisturbed, resumed = "held_out_recall@10", [], []
    for seed in range(3):
        assert run(f"whole-{seed}", seed, -1) == 0
        assert run(f"killed-{seed}", seed, 6 * 3 + 1) == -9
        assert run(f"killed-{seed}", seed, -1) == 0
        tables = []
        for name in ("whole", "killed"):
            with (tmp_path / f"{name}-{seed}" / "metrics.csv").open() as file:
                tables.append([{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)])
        whole, again = tables
        assert [row["epoch"] for row in again] == list(range(1, 13)) and [row["step"] for row in again] == [row["step"] for row in whole]
        assert again[:6] == whole[:6]
        assert again[6]["loss"] == pytest.approx(whole[6]["loss"], rel=0.05)
        undisturbed.append(whole[-1][metric])
        resumed.append(again[-1][metric])
        print(f"seed {seed}: {metric} {undisturbed[-1]:.3f} undisturbed, {resumed[-1]:.3f} killed and resumed;", end=" ")
        print(f"loss {whole[-1]['loss']:.3f}, {again[-1]['loss']:.3f}")
    noise = max(undisturbed) - min(undisturbed) + 1 / 16  # 16 held-out slides
    assert abs(np.mean(resumed) - np.mean(undisturbed)) <= noise
