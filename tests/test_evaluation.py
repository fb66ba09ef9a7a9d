"""Metrics against scikit-learn, protocols against their rules, planted leaks, and every refusal's message."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from folders import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dreslcl import evaluation
from dreslcl.common import ConfigError, ModelError, TableError, read_table, remember
from dreslcl.config import EvalConfig
from dreslcl.evaluation import classification_metrics, evaluate, few_shot, first_hits, fit_probe, interval, load_model, resamples
from dreslcl.formats import Embeddings
from dreslcl.labels import class_numbers, patient_of
from dreslcl.model import DRESLCL

QUICK = EvalConfig(folds=3, bootstrap=50, shots=(1, 3))


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


def run(embeddings, rows, task="subtype", **kwargs):
    return evaluate(embeddings, rows, task, **{"config": QUICK} | kwargs)


def refuses(message, embeddings, rows, *args, error=TableError, **kwargs):
    with refused(error, message):
        run(embeddings, rows, *args, **kwargs)


@pytest.fixture
def texts(monkeypatch):
    """A text side without a model: the vector of each text, by a table that the test fills."""
    vectors = {}
    model = SimpleNamespace(embed_text=lambda asked: np.stack([vectors[text] for text in asked]).astype(np.float32))
    monkeypatch.setattr(evaluation, "load_model", lambda embeddings: model)
    return vectors


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
        expected = {
            "auroc": np.mean([sk.roc_auc_score(y == c, p[:, c], sample_weight=w) for c in range(1 if classes == 2 else 0, classes)]),
            "macro_f1": sk.f1_score(y, p.argmax(1), average="macro", sample_weight=w, zero_division=0),
            "balanced_accuracy": sk.balanced_accuracy_score(y, p.argmax(1), sample_weight=w),
        } | ({"auprc": sk.average_precision_score(y, p[:, 1], sample_weight=w)} if classes == 2 else {})
        assert {name: values[r] for name, values in ours.items()} == pytest.approx(expected, abs=1e-9)


def test_interval_equals_a_plain_bootstrap_over_patients():
    rng = np.random.default_rng(1)
    patients = np.array([f"p{i // 3}" for i in range(90)])
    y, score = rng.integers(2, size=90), rng.random(90)
    weights = resamples(patients, 200, 5)
    ours = interval(classification_metrics(y, np.c_[1 - score, score], weights)["auroc"])
    names, plain = np.unique(patients), []
    for draw in np.random.default_rng(5).integers(len(names), size=(200, len(names))):
        rows = np.concatenate([np.flatnonzero(patients == names[i]) for i in draw])
        plain.append(sk.roc_auc_score(y[rows], score[rows]))
    assert ours == pytest.approx((sk.roc_auc_score(y, score), *np.percentile(plain, [2.5, 97.5])))
    assert interval(np.array([1, np.nan, 0.5])) == (1, 0.5, 0.5), "a resample without a class counts for nothing"


def test_ranks_count_ties_against_the_model_and_medians_equal_numpy():
    for similarity, rank in ((np.zeros((4, 4)), 4), (np.eye(4), 1)):
        assert first_hits(similarity, np.eye(4, dtype=bool)).tolist() == [rank] * 4
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 30, size=41)
    weights = np.stack([np.ones(41), rng.integers(0, 3, size=41)])
    found = evaluation.retrieval_metrics(ranks, weights)
    for r, w in enumerate(weights):
        repeated = np.repeat(ranks, w.astype(int))
        assert found["median_rank"][r] == np.median(repeated)
        assert found["recall@5"][r] == pytest.approx(np.mean(repeated <= 5))


def test_the_chance_line_is_what_random_orders_give():
    hit = np.zeros((3, 12), bool)
    hit[0, 0] = hit[1, :3] = hit[2, 5:7] = True
    rng, chance = np.random.default_rng(0), evaluation.retrieval_chance(hit)
    ranks = np.stack([first_hits(rng.random((3, 12)), hit) for _ in range(4000)])
    for k in (1, 5, 10):
        assert chance[f"recall@{k}"].value == pytest.approx((ranks <= k).mean(), abs=0.02)


# ---- folds and probes


def test_linear_probe_chooses_c_inside_and_equals_scikit_learns_fit():
    rng = np.random.default_rng(0)
    x, y, x_test = rng.normal(size=(60, 8)), np.arange(60) % 3, rng.normal(size=(20, 8))
    x[:, 0] += y
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000)).fit(x, y)
    one_patient = np.where(y == 0, "p", np.arange(60).astype(str))  # no folds by patient can be made: C is 1
    assert fit_probe(x, y, one_patient).predict_proba(x_test) == pytest.approx(plain.predict_proba(x_test), abs=1e-6)
    noise = rng.permutation(y)  # nothing to learn: the strongest shrinkage has the least loss
    probe = fit_probe(x, noise, np.arange(60).astype(str))
    assert probe.predict_proba(x_test) == pytest.approx(np.full((20, 3), 1 / 3), abs=0.02)


def test_few_shot_uses_one_slide_of_each_drawn_patient():
    x = np.r_[np.tile([1.0, 0], (3, 1)), [[-1.0, 0]], np.tile([0, 1.0], (2, 1))]
    y, groups = np.array([0, 0, 0, 0, 1, 1]), np.array(["a", "a", "a", "b", "c", "d"])
    drawn = [few_shot(x, y, groups, np.array([[1.0, 0], [0, 1.0]]), 2, seed) for seed in range(8)]
    assert all((p == drawn[0]).all() for p in drawn)  # both patients are always drawn, and a's slides are equal
    assert drawn[0][1].argmax() == 1
    one = [few_shot(x, y, groups, np.array([[1.0, 0]]), 1, seed)[0, 0] for seed in range(8)]
    assert len(set(np.round(one, 6))) == 2  # one shot: patient a or patient b


def test_a_clear_signal_is_found_above_the_blurred_baseline_and_the_difference_is_paired():
    embeddings, rows = cohort(mean=True)
    outcome = run(embeddings, rows).outcomes[0]
    ours, base = outcome.scores["embedding"]["linear"]["auroc"], outcome.scores["mean-pool"]["linear"]["auroc"]
    assert ours.value > 0.9 > base.value
    assert outcome.differences["mean-pool"]["linear"]["auroc"].value == pytest.approx(ours.value - base.value)
    assert outcome.scores["majority class"]["linear"]["auroc"].value == 0.5
    null = outcome.scores["null"]["linear"]["auroc"]
    assert 0.2 < null.low < null.value < null.high < 0.8 and "null" not in outcome.differences
    odds = sum(np.log(p / (1 - p)) for p in (outcome.probabilities[name][:, 1] for name in ("embedding", "mean-pool")))
    assert outcome.scores["both"]["linear"]["auroc"].value == pytest.approx(sk.roc_auc_score(outcome.slides.y, odds), abs=1e-3)
    assert set(outcome.scores["embedding"]) == {"linear", "5-NN", "1-shot", "3-shot"}
    assert ours.value == pytest.approx(sk.roc_auc_score(outcome.slides.y, outcome.probabilities["embedding"][:, 1]))
    assert (outcome.confusion == sk.confusion_matrix(outcome.slides.y, outcome.probabilities["embedding"].argmax(1))).all()
    assert sorted(outcome.slides.ids) == sorted(embeddings.ids)  # every slide is held out once
    assert len({(row["patient_id"], row["fold"]) for row in outcome.rows}) == 40  # with all of its patient's


def test_the_mean_over_folds_is_that_of_each_folds_own_auroc():
    embeddings, rows = cohort(30, signal=0.5)
    outcome = run(embeddings, rows).outcomes[0]
    fold, y, p = np.array([row["fold"] for row in outcome.rows]), outcome.slides.y, outcome.probabilities["embedding"][:, 1]
    own = [sk.roc_auc_score(y[fold == number], p[fold == number]) for number in range(3)]
    assert outcome.scores["embedding"]["linear"]["auroc_of_folds"].value == pytest.approx(np.mean(own))
    result = run(embeddings, with_split(rows, ("train", "train", "test"), 6), split="split")
    assert "auroc_of_folds" not in result.outcomes[0].scores["embedding"]["linear"]
    assert "one scale" in str(run(embeddings, rows).protocol) and "one scale" not in str(result.protocol)


def test_permuted_labels_give_an_auroc_of_one_half_within_the_interval():
    embeddings, rows = cohort(patients=120, slides=1)
    labels = np.random.default_rng(4).permutation([row["subtype"] for row in rows]).tolist()
    permuted = [row | {"subtype": label} for row, label in zip(rows, labels)]
    score = run(embeddings, permuted, config=EvalConfig(bootstrap=200)).outcomes[0].scores["embedding"]["linear"]["auroc"]
    assert score.low < 0.5 < score.high


def test_comparing_an_embedding_with_itself_gives_no_difference_and_slides_of_one_alone_are_left_out():
    embeddings, rows = cohort(patients=24)
    differences = run((embeddings, embeddings), rows).outcomes[0].differences["compared"]["linear"]
    assert all(tuple(score) == (0, 0, 0) for score in differences.values())
    fewer = Embeddings(embeddings.ids[:-2], embeddings.patients[:-2], embeddings.vectors[:-2])
    result = run((embeddings, fewer), rows)
    assert result.outcomes[0].counts["slides"] == 46
    assert any("compare: 2 labelled slides are not in the second" in text for text in result.warnings)
    refuses("no slide in common", (embeddings, Embeddings(("x",), ("x",), np.ones((1, 4), np.float32))), rows)


# ---- tasks


PAIRS = """0 1|wild type, mutated|WT, MUT|EGFR wild-type, EGFR mut|normal, tumor|Normal, Tumour|nonMSIH, MSIH|MSS, MSI-H|MSI-L, MSI-H|
pMMR, dMMR|Non-Responder, Responder|0.0, 1.0|-1, 1|False, True|HER2-, HER2+|ER negative, ER positive|no, yes|not present, present|
no metastasis, metastasis|benign, malignant|benign tumor, malignant tumor|TMB low, TMB high|unmethylated, methylated|primary, metastatic|
stroma, tumor|control, case|healthy, adenocarcinoma|absent, 1+|unmutated, mutated|N0, N+|inactive, active"""


@pytest.mark.parametrize("pair", PAIRS.replace("\n", "").split("|"))
def test_the_positive_class_is_the_one_that_a_reader_takes_for_it(pair):
    negative, positive = pair.split(", ") if ", " in pair else pair.split()
    for order in ((negative, positive), (positive, negative)):
        y, names = class_numbers(list(order), "c", None, True)
        assert names == (negative, positive) and y.tolist() == [int(name == positive) for name in order]


@pytest.mark.parametrize("pair", ["LUAD LUSC", "1 2", "male female", "lepidic acinar", "grade1 grade2", "EGFR KRAS"])
def test_two_classes_of_which_neither_is_positive_ask_for_it_but_as_subtypes_do_not(pair):
    with pytest.raises(TableError, match=r"2 classes .* no word that tells which is the positive one; use --positive CLASS"):
        class_numbers(pair.split(), "c", None, True)
    assert class_numbers(pair.split(), "c", None, False)[1] == tuple(sorted(pair.split()))


def test_of_three_classes_one_is_set_against_the_rest_when_told():
    embeddings, rows = cohort(30, ("a", "b", "c"))
    outcome = run(embeddings, rows).outcomes[0]
    assert set(outcome.scores["embedding"]["linear"]) == {"auroc", "auroc_of_folds", "macro_f1", "balanced_accuracy"}
    assert outcome.counts["classes"]["b"] == {"slides": 20, "patients": 10, "tested": 20}
    refuses(r"3 classes .* --positive CLASS", embeddings, rows, "recognition", columns=["subtype"])
    result = run(embeddings, rows, "recognition", columns={"subtype": "b"})
    assert result.outcomes[0].slides.classes == ("not b", "b") and "subtype: positive is 'b', 20 of 60 slides." in result.protocol
    refuses("no class 'z' to be the positive one; there are 'a', 'b', 'c'", embeddings, rows, columns={"subtype": "z"})


def test_several_genes_in_one_call_each_count_their_positives_and_skip_unlabelled_slides():
    embeddings, rows = cohort(30, ("0", "1"))
    egfr = [("", "n/a", "Unknown")[i % 3] if i < 10 else str(i // 2 % 3 // 2) for i in range(60)]
    genes = [{**row, "TP53": row["subtype"], "EGFR": state} for row, state in zip(rows, egfr)]
    result = run(embeddings, genes, "mutation", columns=["TP53", "EGFR"])
    first, second = result.outcomes
    assert (first.slides.column, first.counts["classes"]["1"]["slides"]) == ("TP53", 30)
    assert second.counts["unlabelled"] == 10 and second.counts["slides"] == 50
    assert second.counts["classes"]["1"]["slides"] == sum(row["EGFR"] == "1" for row in genes)
    assert "labels: what has no EGFR is left out: 4 '', 3 'n/a', 3 'Unknown'" in result.warnings


def test_zeroshot_averages_prompts_and_needs_one_for_each_class(texts, tmp_path):
    embeddings, rows = cohort(30, ("A", "B"), signal=4)
    texts |= {"a": np.eye(16)[0], "a too": np.eye(16)[2], "b": np.eye(16)[1]}
    for name, text in {"p.json": json.dumps({"A": ["a", "a too"], "B": "b"}), "p.toml": 'A = ["a", "a too"]\nB = "b"'}.items():
        (tmp_path / name).write_text(text)
        outcome = run(embeddings, rows, "zeroshot", texts=tmp_path / name).outcomes[0]
        assert outcome.scores["embedding"]["zero-shot"]["balanced_accuracy"].value > 0.8
    half = np.sqrt(0.5)  # cosine of a class-A vector to the mean of two prompts at right angles
    p = evaluation.cosine_softmax(np.eye(3)[:1], np.array([[1, 1, 0], [0, 0, 1.0]]))
    assert p[0, 0] == pytest.approx(1 / (1 + np.exp(-half / 0.07)))
    (tmp_path / "p.json").write_text('{"A": "a"}')
    refuses("no prompt for class 'B'; the prompts have 'A'", embeddings, rows, "zeroshot", texts=tmp_path / "p.json")


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"a": []}', '{"a": [1]}', '{"a": 3}', None])
def test_prompts_of_another_layout_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "p.json").write_text(text or "")
    prompts = tmp_path / "p.json" if text else None
    refuses(r"p\.json" if text else "--prompts FILE", *cohort(20), "zeroshot", texts=prompts, error=ConfigError)


def test_retrieval_counts_reports_of_the_same_patient_and_the_same_words_as_hits(texts, tmp_path):
    embeddings, rows = cohort(20, slides=2)
    rows = [{"slide_id": row["slide_id"], "patient_id": row["patient_id"], "report": f"report of {row['patient_id']}"} for row in rows]
    rows[1]["report"] = rows[3]["report"] = "two patients share these words"
    texts |= {row["report"]: vector for row, vector in zip(rows, embeddings.vectors)}
    result = run(embeddings, rows, "retrieval")
    outcome = result.outcomes[0]
    assert outcome.counts == {"slides": 40, "patients": 20, "reports": 21, "unlabelled": 0, "seen_left_out": []}
    assert outcome.scores["embedding"]["report → slide"]["recall@1"].value == 1
    assert outcome.scores["chance"]["slide → report"]["recall@1"].value == pytest.approx((36 / 21 + 4 * 2 / 21) / 40)
    result.save(tmp_path)
    table = read_table(tmp_path / "predictions.csv")
    assert len(table) == 61 and set(table[0]) == {"direction", "query", "patient_id", "rank", "first"}
    texts |= dict(zip(texts, np.random.default_rng(99).normal(size=(len(texts), 16))))
    score = run(embeddings, rows, "retrieval").outcomes[0].scores
    assert score["embedding"]["report → slide"]["recall@10"].low < score["chance"]["report → slide"]["recall@10"].value + 0.1


def of_model(embeddings, folder):
    return replace(embeddings, model=DRESLCL.load(folder).fingerprint(), model_folder=str(folder))


@pytest.mark.parametrize("names", ["slides", "patients"])
def test_report_vectors_named_by_slide_or_by_patient_are_retrieved(model, tmp_path, names):
    made, rng = DRESLCL.load(model), np.random.default_rng(0)
    ids, patients = tuple(f"s{i}" for i in range(6)), ("p0", "p0", "p1", "p1", "p2", "p2")
    embeddings = of_model(Embeddings(ids, patients, rng.normal(size=(6, made.joint_dim)).astype(np.float32)), model)
    vector = rng.normal(size=(2, made.text.dim))
    vectors = {key: vector + (i % 5) for i, key in enumerate(dict.fromkeys(ids if names == "slides" else patients))}
    np.savez(tmp_path / "v.npz", **vectors)
    (outcome,) = run(embeddings, tmp_path / "v.npz", "retrieval").outcomes
    assert outcome.counts["reports"] == len({str(v) for v in vectors.values()})  # slides with equal vectors have one report
    assert (outcome.counts["slides"], outcome.counts["patients"]) == (6, 3)
    np.savez(tmp_path / "v.npz", s0=np.ones(3))
    refuses("vectors have width 3", embeddings, tmp_path / "v.npz", "retrieval", error=ModelError)


def test_the_model_of_the_embeddings_is_found_beside_them_or_named(model, tmp_path):
    of_model(cohort(3)[0], model).save(tmp_path / "deep" / "embeddings.h5")
    again = Embeddings.load(tmp_path / "deep")
    assert Path(again.model_folder).samefile(model) and again.by_patient().model_folder == again.model_folder
    assert load_model(again).embed_text(["x"]).shape == (1, load_model(again).joint_dim)
    for bad, message in (
        ({"model_folder": ""}, "made without a model"),
        ({"model_folder": str(tmp_path / "gone")}, "gone: not a whole dreslcl model folder"),
        ({"model": "other"}, "the embeddings were made by other; embed again"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(replace(again, **bad))


# ---- splits


def with_split(rows, words, each=2):
    """Rows with a column `split`: the words in turn, each for so many rows."""
    return [row | {"split": words[i // each % len(words)]} for i, row in enumerate(rows)]


def test_a_split_column_fixes_train_and_test_and_validation_slides_are_not_tested():
    embeddings, rows = cohort(48)
    rows = with_split(rows, ("train", "Train", "val", "test"), each=4)
    result = run(embeddings, rows, split="split", config=replace(QUICK, shots=(1, 25)))
    assert "25-shot" not in result.outcomes[0].scores["embedding"]
    assert "subtype: 25 shots are left out: a training part has 18 patients of class 'A'" in result.warnings
    assert sorted(result.outcomes[0].slides.ids) == sorted(row["slide_id"] for row in rows if row["split"] == "test")
    assert result.protocol[0] == "The split is given by split; no patient is in two parts."


def test_a_patho_bench_table_gives_its_folds_also_where_they_overlap(tmp_path):
    embeddings, rows = cohort(20)
    lines = ["case_id\tslide_id\tsubtype\tfold_0\tfold_1\tfold_10"]
    for i, row in enumerate(rows):
        parts = ["test" if i >= 30 else "train", "test" if i < 10 else "train", "test" if i < 10 else "train"]
        lines.append("\t".join([row["patient_id"], row["slide_id"], "0", *parts]))
    (tmp_path / "k=all.tsv").write_text("\n".join(lines))
    outcome = run(embeddings, rows, split=tmp_path / "k=all.tsv").outcomes[0]
    assert [row["fold"] for row in outcome.rows] == [0] * 10 + [1] * 10 + [2] * 10
    assert tuple(outcome.slides.ids[10:20]) == tuple(outcome.slides.ids[20:30]) == embeddings.ids[:10]
    assert outcome.counts["classes"]["A"]["tested"] + outcome.counts["classes"]["B"]["tested"] == 20


def moved(test):
    """Rows with a column `split`: test where the function of number and row says so, else train."""
    return lambda rows: [row | {"split": "test" if test(i, row) else "train"} for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: with_split(rows, ["train", "maybe"]), "column 'split' holds 'maybe'; the parts of a split are train, val and test"),
        (lambda rows: with_split(rows, ["train"]), "puts no labelled slide with an embedding into test"),
        (moved(lambda i, row: row["patient_id"] > "p010" and row["subtype"] == "B"), "all of class 'B'; two classes are needed"),
        (moved(lambda i, row: row["patient_id"] > "p009" or row["subtype"] == "B"), "a training part holds fewer than two classes"),
        (moved(lambda i, row: i > 30), r"puts patient 'p015' into train \(s015_0\) and test \(s015_1\); 1 patients are on two sides"),
        ("case_id\tslide_id\tfold\nx\ty\ttest\n", "no columns fold_0, fold_1"),
        ("slide_id\tfold_0\ns000_0\ttest\ns000_0.svs\ttrain\n", "a.tsv: slide_id 's000_0' has more than one fold_0: 'test' .line 2. and"),
        ("case_id\tslide_id\tfold_0\nx\ty\ttest\n", "no slide_id or case_id matches the embeddings; the table has 'y', 'x', they"),
        (lambda rows: rows, "no column 'split', nor a file of that name"),
    ],
)
def test_a_split_that_cannot_be_used_is_refused(tmp_path, change, message):
    embeddings, rows = cohort(20)
    if isinstance(change, str):
        (tmp_path / "a.tsv").write_text(change)
        refuses(message, embeddings, rows, split=str(tmp_path / "a.tsv"))
    else:
        refuses(message, embeddings, change(rows), split="split")


# ---- leaks


def test_slides_of_patients_seen_in_pretraining_are_never_tested_unless_asked():
    embeddings, rows = cohort(40, seen=["s000_0", "s003_1"])
    result = run(embeddings, rows)
    gone = ["s000_0", "s000_1", "s003_0", "s003_1"]  # the other slide of a seen patient is no fresh one
    assert result.outcomes[0].counts["seen_left_out"] == gone
    assert not set(gone) & set(result.outcomes[0].slides.ids)
    assert any("4 of 80 slides are of patients seen in pretraining and left out of test: 's000_0'" in text for text in result.warnings)
    kept = run(embeddings, rows, include_seen=True)
    assert len(kept.outcomes[0].slides.ids) == 80 and any("the numbers are optimistic" in text for text in kept.warnings)
    other = replace(embeddings, seen=frozenset(["s005_0"]))  # a second embedding's seen slides are left out too
    assert run((replace(embeddings, seen=frozenset()), other), rows).outcomes[0].counts["seen_left_out"] == ["s005_0", "s005_1"]
    everyone = replace(embeddings, seen=frozenset(embeddings.ids[::2]))
    refuses(r"saw the patients of all 80 slides to test.*use --include-seen .* or pretrain with --exclude", everyone, rows)


@pytest.mark.parametrize("salted", [False, True])
def test_a_seen_patient_is_known_without_a_label_of_the_seen_slide_and_a_selected_one_is_told(tmp_path, salted):
    embeddings, rows = cohort(40)
    seen, selected = ["s000_1.svs", "s001_1", *(["p001", "p002"] if salted else [])], ["s004_0"]  # pretraining knew their patients
    known = {k: v if isinstance(v, str) else frozenset(v) for k, v in remember(seen, selected).items()}
    known = known if salted else {"seen": frozenset(seen), "selected": frozenset(selected)}
    replace(embeddings, **known).save(tmp_path / "embeddings.h5")
    embeddings = Embeddings.load(tmp_path)
    assert not salted or not {*seen, *selected} & (embeddings.seen | embeddings.selected)
    labelled = [row for row in rows if row["slide_id"] not in ("s000_1", "s001_1")]
    for e, labels in (
        (embeddings, labelled),
        (embeddings, [{**row, "patient_id": ""} for row in labelled]),
        (embeddings.by_patient(), rows),
    ):
        result = run(e, labels)
        gone = {patient[:4] for patient in e.patients if patient in ("p000", "p001", *(["p002"] if salted else []))}
        assert set(result.outcomes[0].counts["seen_left_out"]) == {i for i, p in zip(e.ids, e.patients) if p in gone} - {"s000_1", "s001_1"}
        number = "1 of" if len(e) == 40 else "2 of"
        assert any(f"subtype: {number}" in text and "chose the epoch" in text for text in result.warnings), result.warnings


def test_class_words_in_pretraining_reports_are_found_with_counts_and_an_example():
    embeddings, rows = cohort(20, ("squamous cell", "adeno"), seen=["s000_0", "s001_0"])
    reports = {
        "s000_0": "Sheets of cells.\nSquamous-cell carcinoma with keratin.",
        "s001_0": "Adenocarcinoma holds no whole class word.",
        "s009_0": "squamous cell, but pretraining did not read this one",
    }
    result = run(embeddings, rows, texts=[{"slide_id": slide, "report": text} for slide, text in reports.items()])
    assert "Leak scan: 1 of the classes' names stand in the 2 reports that pretraining used." in result.protocol
    assert any("No leak scan" in text for text in run(embeddings, rows).protocol)
    (warning,) = [text for text in result.warnings if "leak scan" in text]
    around = "for example s000_0: “…Sheets of cells. Squamous-cell carcinoma"
    assert "'squamous cell' stands in 1 of 2 pretraining reports" in warning and around in warning
    genes, texts = [row | {"TP53": "01"[row["subtype"] == "adeno"]} for row in rows], [{"slide_id": "x", "report": "TP53, 1 of 0 nodes"}]
    (warning,) = run(replace(embeddings, seen=frozenset()), genes, "mutation", columns=["TP53"], texts=texts).warnings
    assert warning.startswith("leak scan: 'TP53' stands in 1 of 1 p"), "a gene's name, not 0 and 1"


# ---- refusals


@pytest.mark.parametrize(
    "change, message, how",
    [
        (lambda row: row | {"subtype": "rare"} if row["patient_id"] in ("p001", "p002") else row, "class 'rare' has 2 patients, fewer than "
         "the 3 folds; use --folds 2 or merge classes", {}),
        (dict, "no column 'EGFR'; there are slide_id, patient_id, subtype", {"task": "mutation", "columns": ["EGFR"]}),
        (lambda row: {"slide_id": f"x{row['slide_id']}", "subtype": row["subtype"]},
         r"no slide_id matches the embeddings; the table has 'xs000_0'.*they have 's000_0'", {}),
        (lambda row: {"name": "x", "subtype": "A"}, "no column 'slide_id' or 'patient_id'; there are name, subtype", {}),
        (lambda row: row | {"x": "NA"}, "labels: none of the 40 slides with an embedding has a x", {"columns": ["x"]}),
        (lambda row: row | {"subtype": "A"}, r"1 classes .* two are needed", {}),
        (lambda row: row | {"subtype": "a"} if row["patient_id"] == "p002" else row, "'A' and 'a' differ only in how they are written", {}),
        (lambda row: row | {"subtype": "1.0 1 0".split()[int(row["patient_id"][1:]) % 3]}, "'1' and '1.0' differ only", {}),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit_are_refused_in_one_line_that_shows_both_sides(change, message, how):
    embeddings, rows = cohort(20)
    refuses(message, embeddings, [change(row) for row in rows], **how)


def test_ids_on_one_side_only_are_counted_in_a_warning():
    embeddings, rows = cohort(20)
    warnings = run(embeddings, [*rows[2:], {"slide_id": "zz", "patient_id": "q", "subtype": "A"}, rows[0] | {"slide_id": "NA"}]).warnings
    assert "labels: 1 of 39 ids have no embedding and are left out ('zz')" in warnings
    assert "labels: 2 of 40 embeddings have no row and are left out ('s000_0', 's000_1')" in warnings
    assert "labels: what has no slide_id is left out: 1 'NA'" in warnings


def test_names_that_differ_in_suffix_or_unicode_form_are_one_slide_everywhere(tmp_path):
    embeddings, rows = cohort(20, seen=["grün_0.TIFF"])
    ids = [f"grün_{i}" for i in range(40)]
    embeddings = replace(embeddings, ids=tuple(ids))
    forms = ("{}.svs", "{}.SVS", "{}")
    named = [row | {"slide_id": unicodedata.normalize("NFD", forms[i % 3].format(ids[i]))} for i, row in enumerate(rows)]
    other = replace(embeddings, ids=tuple(f"{name}.h5" for name in ids), seen=frozenset())
    (tmp_path / "k.tsv").write_text("slide_id\tfold_0\n" + "\n".join(f"{i}.tif\t{('train', 'test')[n % 8 > 3]}" for n, i in enumerate(ids)))
    result = run((embeddings, other), named, split=tmp_path / "k.tsv", include_seen=True)
    assert result.outcomes[0].counts["slides"] == 40 and len(result.outcomes[0].slides.ids) == 20
    assert not [text for text in result.warnings if "left out (" in text]
    assert run(embeddings, named).outcomes[0].counts["seen_left_out"] == ids[:2]


def test_rows_of_one_slide_are_joined_where_they_agree_and_both_named_where_they_do_not():
    embeddings, rows = cohort(20)
    halves = [row | {"subtype": "NA"} for row in rows] + [{**row, "slide_id": f"{row['slide_id']}.svs", "patient_id": ""} for row in rows]
    assert run(embeddings, [*halves, rows[0]]).outcomes[0].counts["slides"] == 40
    for change, told in (({"subtype": "B"}, "subtype: 'A' .row 1. and 'B'"), ({"patient_id": "p9"}, "patient_id: 'p000' .row 1. and 'p9'")):
        again = rows[0] | {"slide_id": "s000_0.svs"} | change
        refuses(f"labels: slide_id 's000_0' has more than one {told} .row 41.; keep one", embeddings, [*rows, again])
    by_patient = [{"case_id": row["patient_id"], "subtype": "AB"[i % 2]} for i, row in enumerate(rows)]
    refuses("case_id 'p000' has more than one subtype: 'A' .row 1. and 'B' .row 2.", embeddings, by_patient)


# ---- patients, files


def test_patients_come_from_the_table_the_embeddings_the_barcode_or_the_slide():
    slide = "TCGA-AB-1234-01Z-00-DX1.uuid"
    for table, known, patient in (("P1", "P2", "P1"), ("NA", "P2", "P2"), ("", "", "TCGA-AB-1234"), ("", slide, "TCGA-AB-1234")):
        assert patient_of(slide, table, known) == patient
    assert patient_of("007", "", "unknown") == "007"


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
    assert str(result) == str(run(embeddings, labels))  # two runs of one seed are equal
    result.save(tmp_path / "out")
    table = read_table(tmp_path / "out" / "predictions.csv")
    assert [row["slide_id"] for row in table] == list(result.outcomes[0].slides.ids) and len(table) == 38
    assert {row["label"] for row in table} == {"'=cmd()", "B"}
    assert float(table[0]["p_=cmd()"]) + float(table[0]["p_B"]) == pytest.approx(1, abs=1e-5)
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]["subtype"]
    value = result.outcomes[0].scores["embedding"]["linear"]["auroc"].value
    assert saved["scores"]["embedding"]["linear"]["auroc"]["value"] == pytest.approx(value, abs=1e-6)
    assert saved["counts"]["seen_left_out"] == ["s000_0", "s000_1"]
    assert saved["confusion"] == result.outcomes[0].confusion.tolist()
