"""Metrics against scikit-learn, protocols against their rules, planted leaks, and every refusal's message."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dreslcl.common import ConfigError, StoreError, TableError
from dreslcl.config import EvalConfig
from dreslcl.embedding import Embeddings
from dreslcl.evaluation import (
    classification_metrics,
    evaluate,
    few_shot_probe,
    first_hits,
    interval,
    linear_probe,
    resamples,
    retrieval_chance,
    retrieval_metrics,
    zero_shot,
)
from dreslcl.labels import patient_folds, patient_of

QUICK = EvalConfig(folds=3, bootstrap=50, shots=(1, 3), draws=2)


def cohort(patients=40, classes=("A", "B"), slides=2, signal=2.0, seed=0, mean=False, seen=()):
    """Embeddings of patients with some slides each, and label rows; the class moves one coordinate per class."""
    rng = np.random.default_rng(seed)
    y = np.arange(patients) % len(classes)
    rows, vectors = [], []
    for p in range(patients):
        for s in range(slides):
            rows.append({"slide_id": f"s{p:03}_{s}", "patient_id": f"p{p:03}", "subtype": classes[y[p]]})
            vectors.append(rng.normal(size=16) + signal * np.eye(16)[y[p]])
    x = np.array(vectors, np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    blurred = (x + 2 * rng.normal(size=x.shape)).astype(np.float32) if mean else None
    ids, owners = zip(*((row["slide_id"], row["patient_id"]) for row in rows))
    return Embeddings(ids, owners, unit, blurred, frozenset(seen), "model"), rows


def run(embeddings, rows, **kwargs):
    return evaluate(embeddings, rows, **{"task": "subtype", "config": QUICK} | kwargs)


def test_evaluation_loads_no_torch():
    code = "import sys, dreslcl.evaluation, dreslcl.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- metrics


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 5), st.integers(0, 10**6), st.booleans())
def test_metrics_equal_scikit_learn_with_and_without_weights(classes, seed, ties):
    rng = np.random.default_rng(seed)
    n = 60
    y = np.r_[np.arange(classes), rng.integers(classes, size=n - classes)]
    p = rng.dirichlet(np.ones(classes), size=n)
    p = np.round(p, 1) + 1e-3 if ties else p
    p /= p.sum(1, keepdims=True)
    weights = np.stack([np.ones(n), np.r_[np.ones(classes), rng.integers(0, 4, size=n - classes)]])
    ours = classification_metrics(y, p, weights)
    for r, w in enumerate(weights):
        for name, expected in {
            "auroc": np.mean([sk.roc_auc_score(y == c, p[:, c], sample_weight=w) for c in range(classes)]),
            "macro_f1": sk.f1_score(y, p.argmax(1), average="macro", sample_weight=w, zero_division=0),
            "balanced_accuracy": sk.balanced_accuracy_score(y, p.argmax(1), sample_weight=w),
        }.items():
            if classes > 2 or name != "auroc":
                assert ours[name][r] == pytest.approx(expected, abs=1e-9), name
        if classes == 2:
            assert ours["auroc"][r] == pytest.approx(sk.roc_auc_score(y, p[:, 1], sample_weight=w), abs=1e-9)
            assert ours["auprc"][r] == pytest.approx(sk.average_precision_score(y, p[:, 1], sample_weight=w), abs=1e-9)


def test_interval_equals_a_plain_bootstrap_over_patients():
    rng = np.random.default_rng(1)
    patients = np.array([f"p{i // 3}" for i in range(90)])
    y, score = rng.integers(2, size=90), rng.random(90)
    weights = resamples(patients, 200, 5)
    ours = interval(classification_metrics(y, np.c_[1 - score, score], weights)["auroc"])
    names = np.unique(patients)
    drawn = np.random.default_rng(5).integers(len(names), size=(200, len(names)))
    plain = []
    for draw in drawn:
        rows = np.concatenate([np.flatnonzero(patients == names[i]) for i in draw])
        plain.append(sk.roc_auc_score(y[rows], score[rows]))
    assert ours == pytest.approx((sk.roc_auc_score(y, score), *np.percentile(plain, [2.5, 97.5])))


def test_a_resample_draws_as_many_patients_as_there_are_and_keeps_their_slides_together():
    weights = resamples(["a", "a", "b", "c"], 100, 0)
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 1:].sum(1) == 3).all()


def test_a_resample_without_one_class_leaves_the_interval():
    values = classification_metrics(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[1.0, 1], [2, 0]]))
    assert values["auroc"][0] == 1 and np.isnan(values["auroc"][1])
    assert interval(values["auroc"])[0] == 1


def test_ranks_count_ties_against_the_model_and_medians_equal_numpy():
    hit = np.eye(4, dtype=bool)
    assert first_hits(np.zeros((4, 4)), hit).tolist() == [4, 4, 4, 4]
    assert first_hits(np.eye(4), hit).tolist() == [1, 1, 1, 1]
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 30, size=41)
    weights = np.stack([np.ones(41), rng.integers(0, 3, size=41)])
    found = retrieval_metrics(ranks, weights)
    for r, w in enumerate(weights):
        repeated = np.repeat(ranks, w.astype(int))
        assert found["median_rank"][r] == np.median(repeated)
        assert found["recall@5"][r] == pytest.approx(np.mean(repeated <= 5))


def test_the_chance_line_is_what_random_orders_give():
    hit = np.zeros((3, 12), bool)
    hit[0, 0] = hit[1, :3] = hit[2, 5:7] = True
    rng = np.random.default_rng(0)
    ranks = np.stack([first_hits(rng.random((3, 12)), hit) for _ in range(4000)])
    chance = retrieval_chance(hit)
    for k in (1, 5, 10):
        assert chance[f"recall@{k}"] == pytest.approx((ranks <= k).mean(), abs=0.02)


# ---- folds and probes


def test_folds_are_scikit_learns_and_no_patient_is_on_two_sides():
    _, rows = cohort(30)
    y, patients = np.array([row["subtype"] == "B" for row in rows]).astype(int), np.array([row["patient_id"] for row in rows])
    folds = patient_folds(y, patients, 5, 3)
    expected = StratifiedGroupKFold(5, shuffle=True, random_state=3).split(y, y, patients)
    for fold, (train, test) in zip(folds, expected):
        assert (fold.train == train).all() and (fold.test == test).all()
        assert not set(patients[train]) & set(patients[test])


def test_linear_probe_chooses_c_inside_and_equals_scikit_learns_fit():
    rng = np.random.default_rng(0)
    x, y, x_test = rng.normal(size=(60, 8)), np.arange(60) % 3, rng.normal(size=(20, 8))
    x[:, 0] += y
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000)).fit(x, y)
    assert linear_probe(x, y, [], x_test, 3) == pytest.approx(plain.predict_proba(x_test), abs=1e-6)
    noise = rng.permutation(y)  # nothing to learn: the strongest shrinkage has the least loss
    inner = [(f.train, f.test) for f in patient_folds(noise, np.arange(60).astype(str), 3, 0)]
    assert linear_probe(x, noise, inner, x_test, 3) == pytest.approx(np.full((20, 3), 1 / 3), abs=0.02)


def test_few_shot_uses_one_slide_of_each_drawn_patient():
    x = np.r_[np.tile([1.0, 0], (3, 1)), [[-1.0, 0]], np.tile([0, 1.0], (2, 1))]
    y, groups = np.array([0, 0, 0, 0, 1, 1]), np.array(["a", "a", "a", "b", "c", "d"])
    drawn = [few_shot_probe(x, y, groups, np.array([[1.0, 0], [0, 1.0]]), 2, 2, seed) for seed in range(8)]
    assert all((p == drawn[0]).all() for p in drawn)  # both patients are always drawn, and a's slides are equal
    assert drawn[0][1].argmax() == 1
    one = [few_shot_probe(x, y, groups, np.array([[1.0, 0]]), 2, 1, seed)[0, 0] for seed in range(8)]
    assert len(set(np.round(one, 6))) == 2  # one shot: patient a or patient b


def test_a_clear_signal_is_found_above_the_blurred_baseline_and_the_difference_is_paired():
    embeddings, rows = cohort(mean=True)
    outcome = run(embeddings, rows).outcomes[0]
    ours, base = outcome.scores["embedding"]["linear"]["auroc"], outcome.scores["mean-pool"]["linear"]["auroc"]
    assert ours.value > 0.9 > base.value
    assert outcome.differences["mean-pool"]["linear"]["auroc"].value == pytest.approx(ours.value - base.value)
    assert outcome.scores["majority class"]["linear"]["auroc"].value == 0.5
    assert set(outcome.scores["embedding"]) == {"linear", "5-NN", "1-shot", "3-shot"}
    assert outcome.scores["embedding"]["linear"]["auroc"].value == pytest.approx(
        sk.roc_auc_score(outcome.y, outcome.probabilities["embedding"][:, 1])
    )
    assert (outcome.confusion == sk.confusion_matrix(outcome.y, outcome.probabilities["embedding"].argmax(1))).all()
    assert sorted(outcome.ids) == sorted(embeddings.ids)  # every slide is held out once


def test_permuted_labels_give_an_auroc_of_one_half_within_the_interval():
    embeddings, rows = cohort(patients=120, slides=1)
    labels = np.random.default_rng(4).permutation([row["subtype"] for row in rows])
    permuted = [row | {"subtype": str(label)} for row, label in zip(rows, labels)]
    score = run(embeddings, permuted, config=EvalConfig(bootstrap=200)).outcomes[0].scores["embedding"]["linear"]["auroc"]
    assert score.low < 0.5 < score.high


def test_comparing_an_embedding_with_itself_gives_no_difference():
    embeddings, rows = cohort(patients=24)
    outcome = run(embeddings, rows, compare=embeddings).outcomes[0]
    assert all(tuple(score) == (0, 0, 0) for score in outcome.differences["compared"]["linear"].values())


def test_slides_that_only_one_of_two_embeddings_has_are_left_out():
    embeddings, rows = cohort(patients=24)
    fewer = Embeddings(embeddings.ids[:-2], embeddings.patients[:-2], embeddings.vectors[:-2])
    result = run(embeddings, rows, compare=fewer)
    assert result.outcomes[0].counts["slides"] == 46
    assert any("compare: 2 labelled slides are not in the second" in text for text in result.warnings)
    with pytest.raises(TableError, match="no slide in common"):
        run(embeddings, rows, compare=Embeddings(("x",), ("x",), np.ones((1, 4), np.float32)))


# ---- tasks


def test_three_classes_have_no_auprc_and_every_class_is_counted():
    embeddings, rows = cohort(30, ("LUAD", "LUSC", "normal"))
    outcome = run(embeddings, rows).outcomes[0]
    assert set(outcome.scores["embedding"]["linear"]) == {"auroc", "macro_f1", "balanced_accuracy"}
    assert outcome.counts["classes"]["LUSC"] == {"slides": 20, "patients": 10, "tested": 20}


@pytest.mark.parametrize("names, positive", [(("0", "1"), "1"), (("tumor", "normal"), "tumor"), (("mutated", "wild type"), "mutated")])
def test_the_positive_class_is_the_one_that_does_not_read_as_a_negative(names, positive):
    embeddings, rows = cohort(20, names)
    result = run(embeddings, rows, task="recognition", columns=["subtype"])
    assert result.outcomes[0].classes[1] == positive
    assert f"subtype: positive is '{positive}', 20 of 40 slides." in result.protocol


def test_recognition_sets_one_class_against_the_rest_when_told():
    embeddings, rows = cohort(30, ("a", "b", "c"))
    with pytest.raises(TableError, match=r"3 classes .* --positive CLASS"):
        run(embeddings, rows, task="recognition", columns=["subtype"])
    assert run(embeddings, rows, task="recognition", columns=["subtype"], positive="b").outcomes[0].classes == ("not b", "b")
    with pytest.raises(TableError, match="no class 'z' to be the positive one; there are 'a', 'b', 'c'"):
        run(embeddings, rows, task="recognition", columns=["subtype"], positive="z")


def test_several_genes_in_one_call_each_count_their_positives_and_skip_unlabelled_slides():
    embeddings, rows = cohort(30, ("0", "1"))
    genes = [{**row, "TP53": row["subtype"], "EGFR": "" if i < 10 else str(i // 2 % 3 // 2)} for i, row in enumerate(rows)]
    first, second = run(embeddings, genes, task="mutation", columns=["TP53", "EGFR"]).outcomes
    assert (first.column, first.counts["classes"]["1"]["slides"]) == ("TP53", 30)
    assert second.counts["unlabelled"] == 10 and second.counts["slides"] == 50
    assert second.counts["classes"]["1"]["slides"] == sum(row["EGFR"] == "1" for row in genes)


def test_zeroshot_averages_prompts_and_needs_one_for_each_class():
    embeddings, rows = cohort(30, ("A", "B"), signal=4)
    prompts = {"A": np.eye(16)[[0, 0]], "B": np.eye(16)[1], "other": np.eye(16)[2]}
    outcome = run(embeddings, rows, task="zeroshot", text=prompts).outcomes[0]
    assert outcome.scores["embedding"]["zero-shot"]["balanced_accuracy"].value > 0.9
    p = zero_shot(np.eye(3)[:1], {"A": np.array([[1.0, 0, 0], [0, 1, 0]]), "B": np.array([0, 0, 1.0])}, ("A", "B"), "subtype")
    assert p[0, 0] == pytest.approx(1 / (1 + np.exp(-(0.5**0.5) / 0.07)))
    with pytest.raises(TableError, match="no prompt for class 'B'; the prompts have 'A'"):
        run(embeddings, rows, task="zeroshot", text={"A": np.eye(16)[0]})
    with pytest.raises(TableError, match="needs text vectors"):
        run(embeddings, rows, task="zeroshot")


def test_retrieval_counts_reports_of_the_same_patient_and_the_same_words_as_hits(tmp_path):
    embeddings, rows = cohort(20, slides=2)
    rows = [{"slide_id": row["slide_id"], "patient_id": row["patient_id"], "report": f"report of {row['patient_id']}"} for row in rows]
    rows[1]["report"] = rows[3]["report"] = "two patients share these words"
    result = run(embeddings, rows, task="retrieval", text=embeddings.vectors)
    outcome = result.outcomes[0]
    assert outcome.counts == {"slides": 40, "patients": 20, "reports": 21, "seen_left_out": []}
    assert outcome.scores["embedding"]["report → slide"]["recall@1"].value == 1
    assert outcome.scores["chance"]["slide → report"]["recall@1"].value == pytest.approx((36 / 21 + 4 * 2 / 21) / 40)
    result.save(tmp_path)
    table = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(table) == 61 and set(table[0]) == {"direction", "query", "patient_id", "rank", "first"}
    shuffled = run(embeddings, rows, task="retrieval", text=np.random.default_rng(99).normal(size=embeddings.vectors.shape))
    score = shuffled.outcomes[0].scores
    assert score["embedding"]["report → slide"]["recall@10"].low < score["chance"]["report → slide"]["recall@10"].value + 0.1


# ---- splits


def split_rows(rows, words):
    return [row | {"split": words[i // 2 % len(words)]} for i, row in enumerate(rows)]


def test_a_split_column_fixes_train_and_test():
    embeddings, rows = cohort(40)
    rows = [row | {"split": "test" if i >= 60 else "Train"} for i, row in enumerate(rows)]
    outcome = run(embeddings, rows, split_column="split").outcomes[0]
    assert sorted(outcome.ids) == sorted(embeddings.ids[60:])


def test_validation_slides_choose_c_and_train_but_are_not_tested():
    embeddings, rows = cohort(48)
    rows = [row | {"split": ("train", "train", "val", "test")[i // 4 % 4]} for i, row in enumerate(rows)]
    result = run(embeddings, rows, split_column="split")
    assert sorted(result.outcomes[0].ids) == sorted(row["slide_id"] for row in rows if row["split"] == "test")
    assert result.protocol[0] == "The split is given by split; no patient is in two parts."


def test_a_patho_bench_table_gives_its_folds_also_where_they_overlap(tmp_path):
    embeddings, rows = cohort(20)
    lines = ["case_id\tslide_id\tsubtype\tfold_0\tfold_1\tfold_10"]
    for i, row in enumerate(rows):
        parts = ["test" if i >= 30 else "train", "test" if i < 10 else "train", "test" if i < 10 else "train"]
        lines.append("\t".join([row["patient_id"], row["slide_id"], "0", *parts]))
    (tmp_path / "k=all.tsv").write_text("\n".join(lines))
    outcome = run(embeddings, rows, splits=tmp_path / "k=all.tsv").outcomes[0]
    assert outcome.fold.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert outcome.ids[10:20] == outcome.ids[20:30] == embeddings.ids[:10]
    assert outcome.counts["classes"]["A"]["tested"] + outcome.counts["classes"]["B"]["tested"] == 20


def test_split_tables_without_folds_or_ids_are_refused(tmp_path):
    embeddings, rows = cohort(20)
    (tmp_path / "a.tsv").write_text("case_id\tslide_id\tfold\nx\ty\ttest\n")
    with pytest.raises(TableError, match="no columns fold_0, fold_1"):
        run(embeddings, rows, splits=tmp_path / "a.tsv")
    (tmp_path / "b.tsv").write_text("case_id\tslide_id\tfold_0\nx\ty\ttest\n")
    with pytest.raises(TableError, match="no id matches; the table has 'x', 'y', the embeddings have 's000_0'"):
        run(embeddings, rows, splits=tmp_path / "b.tsv")


# ---- leaks


def test_a_patient_on_both_sides_is_refused():
    embeddings, rows = cohort(40)
    rows = [row | {"split": "test" if i >= 61 else "train"} for i, row in enumerate(rows)]
    with pytest.raises(TableError, match=r"puts patient 'p030' into train \(s030_0\) and test \(s030_1\); 1 patients are on two sides"):
        run(embeddings, rows, split_column="split")


def test_slides_of_patients_seen_in_pretraining_are_never_tested_unless_asked():
    embeddings, rows = cohort(40, seen=["s000_0", "s003_1"])
    result = run(embeddings, rows)
    gone = ["s000_0", "s000_1", "s003_0", "s003_1"]  # the other slide of a seen patient is no fresh one
    assert result.outcomes[0].counts["seen_left_out"] == gone
    assert not set(gone) & set(result.outcomes[0].ids)
    assert any("4 of 80 slides are of patients seen in pretraining and left out of test: 's000_0'" in text for text in result.warnings)
    kept = run(embeddings, rows, include_seen=True)
    assert len(kept.outcomes[0].ids) == 80 and any("the numbers are optimistic" in text for text in kept.warnings)


def test_a_second_embeddings_seen_slides_are_left_out_too():
    embeddings, rows = cohort(40)
    other = Embeddings(embeddings.ids, embeddings.patients, embeddings.vectors, None, frozenset(["s005_0"]))
    assert run(embeddings, rows, compare=other).outcomes[0].counts["seen_left_out"] == ["s005_0", "s005_1"]


def test_embeddings_that_saw_everything_say_what_to_do():
    embeddings, rows = cohort(40, seen=[f"s{p:03}_0" for p in range(40)])
    with pytest.raises(TableError, match=r"saw the patients of all 80 slides to test.*use --include-seen .* or pretrain with --exclude"):
        run(embeddings, rows)


def test_class_words_in_pretraining_reports_are_found_with_counts_and_an_example():
    embeddings, rows = cohort(20, ("squamous cell", "adeno"), seen=["s000_0", "s001_0"])
    reports = [
        {"slide_id": "s000_0", "report": "Sheets of cells.\nSquamous-cell carcinoma with keratin."},
        {"slide_id": "s001_0", "report": "Adenocarcinoma holds no whole class word."},
        {"slide_id": "s009_0", "report": "squamous cell, but pretraining did not read this one"},
    ]
    result = run(embeddings, rows, reports=reports)
    assert "Leak scan: 1 of the classes' names stand in the 2 reports that pretraining used." in result.protocol
    assert any("No leak scan" in text for text in run(embeddings, rows).protocol)
    warnings = [text for text in result.warnings if "leak scan" in text]
    assert len(warnings) == 1
    assert (
        "'squamous cell' stands in 1 of 2 pretraining reports, for example s000_0: “…Sheets of cells. Squamous-cell carcinoma"
        in warnings[0]
    )


def test_the_leak_scan_looks_for_gene_names_and_not_for_yes_and_no():
    embeddings, rows = cohort(20, ("0", "1"))
    genes = [row | {"TP53": row["subtype"]} for row in rows]
    reports = [{"slide_id": "x", "report": "TP53 mutated, 1 of 0 nodes"}]
    warnings = run(embeddings, genes, task="mutation", columns=["TP53"], reports=reports).warnings
    assert [text[:35] for text in warnings] == ["leak scan: 'TP53' stands in 1 of 1 p"[:35]]


# ---- refusals


def test_a_class_with_fewer_patients_than_folds_is_refused():
    embeddings, rows = cohort(20)
    rows = [row | {"subtype": "rare"} if row["patient_id"] in ("p001", "p002") else row for row in rows]
    with pytest.raises(TableError, match="class 'rare' has 2 patients, fewer than the 3 folds; use --folds 2 or merge classes"):
        run(embeddings, rows)


def test_an_absent_column_is_refused_with_the_columns_listed():
    embeddings, rows = cohort(20)
    with pytest.raises(TableError, match="no column 'EGFR'; there are slide_id, patient_id, subtype"):
        run(embeddings, rows, task="mutation", columns=["EGFR"])
    with pytest.raises(TableError, match="no column 'fold'"):
        run(embeddings, rows, split_column="fold")


def test_ids_that_do_not_match_are_shown_from_both_sides():
    embeddings, rows = cohort(20)
    wrong = [{"slide_id": row["slide_id"] + ".svs", "subtype": row["subtype"]} for row in rows]
    with pytest.raises(TableError, match=r"no slide_id matches the embeddings; the table has 's000_0.svs'.*they have 's000_0'"):
        run(embeddings, wrong)
    with pytest.raises(TableError, match="no column 'slide_id' or 'patient_id'; there are name, subtype"):
        run(embeddings, [{"name": "x", "subtype": "A"}])


def test_ids_on_one_side_only_are_counted_in_a_warning():
    embeddings, rows = cohort(20)
    warnings = run(embeddings, [*rows[2:], {"slide_id": "zz", "patient_id": "q", "subtype": "A"}]).warnings
    assert "labels: 1 of 39 ids have no embedding and are left out ('zz')" in warnings
    assert "labels: 2 of 40 embeddings have no row and are left out ('s000_0', 's000_1')" in warnings


def test_rows_of_one_slide_that_contradict_each_other_are_refused():
    embeddings, rows = cohort(20)
    assert run(embeddings, [*rows, rows[0]]).outcomes[0].counts["slides"] == 40
    with pytest.raises(TableError, match="two rows of slide_id 's000_0' differ in 'subtype'; keep one"):
        run(embeddings, [*rows, rows[0] | {"subtype": "B"}])


def test_one_class_or_a_strange_part_of_a_split_is_refused():
    embeddings, rows = cohort(20)
    with pytest.raises(TableError, match=r"1 classes .* two are needed"):
        run(embeddings, [row | {"subtype": "A"} for row in rows])
    with pytest.raises(TableError, match="column 'split' holds 'maybe'; the parts of a split are train, val and test"):
        run(embeddings, split_rows(rows, ["train", "maybe"]), split_column="split")
    with pytest.raises(TableError, match="puts no labelled slide with an embedding into test"):
        run(embeddings, split_rows(rows, ["train"]), split_column="split")
    half = [row | {"split": "train" if row["subtype"] == "A" else "test"} for row in rows]
    with pytest.raises(TableError, match="all of class 'B'; two classes are needed"):
        run(embeddings, half, split_column="split")
    untrainable = [row | {"split": "train" if row["subtype"] == "A" and i < 20 else "test"} for i, row in enumerate(rows)]
    untrainable = [row | {"split": "train" if row["patient_id"] < "p010" and row["subtype"] == "A" else "test"} for row in untrainable]
    with pytest.raises(TableError, match="a training part holds fewer than two classes"):
        run(embeddings, untrainable, split_column="split")


def test_too_many_shots_are_left_out_with_a_warning():
    embeddings, rows = cohort(20)
    result = run(embeddings, rows, config=EvalConfig(folds=2, bootstrap=20, shots=(1, 25)))
    assert "25-shot" not in result.outcomes[0].scores["embedding"]
    assert any("25 shots are left out: a training part has 5 patients of class" in text for text in result.warnings)


def test_settings_without_sense_are_refused():
    for bad in ({"folds": 1}, {"inner_folds": 1}, {"bootstrap": 0}, {"draws": 0}, {"neighbours": 0}, {"shots": (0,)}):
        with pytest.raises(ConfigError):
            EvalConfig(**bad)


# ---- patients, files


@pytest.mark.parametrize(
    "slide, table, known, patient",
    [
        ("TCGA-AB-1234-01Z-00-DX1.uuid", "P1", "P2", "P1"),
        ("TCGA-AB-1234-01Z-00-DX1.uuid", "", "P2", "P2"),
        ("TCGA-AB-1234-01Z-00-DX1.uuid", "", "", "TCGA-AB-1234"),
        ("TCGA-AB-1234-01Z-00-DX1.uuid", "", "TCGA-AB-1234-01Z-00-DX1.uuid", "TCGA-AB-1234"),
        ("007", "", "", "007"),
    ],
)
def test_patients_come_from_the_table_the_embeddings_the_barcode_or_the_slide(slide, table, known, patient):
    assert patient_of(slide, table, known) == patient


def test_labels_by_patient_reach_every_slide_and_averaged_embeddings():
    embeddings, rows = cohort(20)
    by_patient = [{"patient_id": row["patient_id"], "subtype": row["subtype"]} for row in rows[::2]]
    assert run(embeddings, by_patient).outcomes[0].counts["slides"] == 40
    assert run(embeddings.by_patient(), rows).outcomes[0].counts == run(embeddings.by_patient(), by_patient).outcomes[0].counts


def test_saved_files_hold_every_held_out_prediction_and_plain_json(tmp_path):
    embeddings, rows = cohort(20, ("=cmd()", "B"), seen=["s000_0"])
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,patient_id,subtype\n" + "\n".join(",".join(row.values()) for row in rows))
    result = run(embeddings, labels)
    result.save(tmp_path / "out")
    table = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert [row["slide_id"] for row in table] == list(result.outcomes[0].ids) and len(table) == 38
    assert {row["label"] for row in table} == {"'=cmd()", "B"}
    assert float(table[0]["p_=cmd()"]) + float(table[0]["p_B"]) == pytest.approx(1, abs=1e-5)
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]["subtype"]
    assert saved["scores"]["embedding"]["linear"]["auroc"]["value"] == pytest.approx(
        result.outcomes[0].scores["embedding"]["linear"]["auroc"].value, abs=1e-6
    )
    assert saved["counts"]["seen_left_out"] == ["s000_0", "s000_1"]
    assert saved["confusion"] == result.outcomes[0].confusion.tolist()


def test_two_runs_of_one_seed_are_equal():
    embeddings, rows = cohort(20)
    assert run(embeddings, rows).table() == run(embeddings, rows).table()


def test_embeddings_survive_writing_and_refuse_contradictions(tmp_path):
    embeddings, _ = cohort(5, mean=True, seen=["s000_0", "elsewhere"])
    embeddings.save(tmp_path / "embeddings.h5")
    again = Embeddings.load(tmp_path)
    assert (again.ids, again.patients, again.seen, again.model) == (embeddings.ids, embeddings.patients, embeddings.seen, "model")
    assert (again.vectors == embeddings.vectors).all() and (again.mean == embeddings.mean).all()
    with pytest.raises(StoreError, match="'a' comes twice"):
        Embeddings(("a", "a"), ("", ""), np.eye(2, dtype=np.float32))
    with pytest.raises(StoreError, match="differ in length"):
        Embeddings(("a",), ("",), np.eye(2, dtype=np.float32))
    with pytest.raises(StoreError, match="not finite, first 'b'"):
        Embeddings(("a", "b"), ("", ""), np.array([[1], [np.nan]], np.float32))
    (tmp_path / "bad.h5").write_bytes(b"no")
    with pytest.raises(StoreError, match="not an embeddings file"):
        Embeddings.load(tmp_path / "bad.h5")
    with pytest.raises(StoreError, match="`dreslcl embed` writes it"):
        Embeddings.load(tmp_path / "none.h5")
