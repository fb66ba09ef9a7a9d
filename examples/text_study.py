"""How a report is best read: ways to make report vectors, each trained with on the same parts of the TCGA training patients.

    text_study.py FOLDER --out OUT [--sentence NAME] [--ways lsa both width=512 ...] [--folds 0/3 1/3 2/3] [--seed 0]

FOLDER is study.py's for `tcga`. What is fitted is fitted on the reports that are trained on. OUT/text.csv gets one row for each
finished run, which is not done again. A way is a name or KEY=VALUE of WAYS' first line.
"""

import argparse
import json
import logging
import re
from pathlib import Path
from statistics import mean

import h5py
import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from study import load_study, run, settings

from dreslcl.common import fingerprint, read_table, write_table
from dreslcl.config import RunConfig
from dreslcl.formats import patient_of, read_reports
from dreslcl.text import PLACES, TFIDF, Sentence, Text, clean_report

WAYS = {
    "lsa": {"lsa": True, "sentence": False, "width": 256, "words": 1, "patients": 3, "clean": True, "pieces": "sentences", "unit": False},
    "sentence": {"lsa": False, "sentence": True},
    "both": {"sentence": True},
}
SHOWN = ["recall@10", "subtype", "TP53"]
COLUMNS = ["retrieval.embedding.report_→_slide.recall@10", "subtype.embedding.linear.auroc", "mutation.embedding.linear.auroc"]


def cut(report: str, way: dict) -> list[str]:
    """A report's pieces."""
    report = clean_report(report) if way["clean"] else report
    if way["pieces"] == "report":
        return [report]
    if not way["clean"]:
        return re.split(r"(?<=[.!?;])\s+", report)
    words = report.split()
    windows = [" ".join(words[i : i + 64]) for i in range(0, max(1, len(words) - 32), 32)]
    return Text(1).pieces(report) if way["pieces"] == "sentences" else windows


def vectors(reports: dict[str, str], trained: set[str], way: dict, sentence: Sentence | None, store: Path) -> dict[str, np.ndarray]:
    """Report vectors (n, X) by patient."""
    pieces, parts = {who: cut(report, way) for who, report in reports.items()}, []
    if way["lsa"]:
        plain = {who: " ".join(cut(report, way | {"pieces": "report"})) for who, report in reports.items()}
        learnt = [plain[who] for who in sorted(trained & set(reports))]
        kinds = TFIDF | {"ngram_range": (1, way["words"])}
        whole = TfidfVectorizer(**kinds, min_df=way["patients"])
        words = [word for word in whole.fit(learnt).get_feature_names_out() if not PLACES & set(word.split())]
        fitted = TfidfVectorizer(**kinds, vocabulary=words)
        svd = TruncatedSVD(min(way["width"], len(learnt) - 1), random_state=0).fit(fitted.fit_transform(learnt))
        tfidf = TfidfVectorizer(**kinds, vocabulary=words, norm="l2" if way["unit"] else None)
        tfidf.idf_ = fitted.idf_
        found = {who: np.float32(svd.transform(tfidf.transform(texts))) for who, texts in pieces.items()}
        length = mean(float(np.linalg.norm(row)) for who in trained & set(found) for row in found[who])
        parts.append({who: rows / length for who, rows in found.items()})
    if way["sentence"]:
        assert sentence is not None, "--sentence NAME is needed"
        encoded = {}
        with h5py.File(store, "a") as file:
            for who, texts in pieces.items():
                key = fingerprint(who, *texts)
                if key not in file:
                    file[key] = sentence.encode(texts).numpy()
                encoded[who] = file[key][()]
        parts.append(encoded)
    return {who: np.concatenate([part[who] for part in parts], axis=1) for who in reports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentence", help="a model of sentence-transformers, by name or folder")
    parser.add_argument("--ways", nargs="+", default=["lsa"])
    parser.add_argument("--folds", nargs="+", default=["0/3", "1/3", "2/3"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    table, sentence = options.out / "text.csv", Sentence(options.sentence) if options.sentence else None
    rows = list(read_table(table)) if table.exists() else []
    reports = {patient_of(row["slide_id"] or row["patient_id"]): row["report"] for row in read_reports(options.folder / "reports.csv")}
    for fold in options.folds:
        study = load_study("tcga", options.folder, options.out, None, None, fold)
        trained = {member.patient_id for member in study.train.members}
        for name in options.ways:
            if any((row["way"], row["fold"], row["seed"]) == (name, fold, str(options.seed)) for row in rows):
                continue
            key, _, value = name.partition("=")
            try:
                change = {key: json.loads(value)} if value else WAYS[name]
            except ValueError:
                change = {key: value}
            file = options.out / f"{name.replace('=', '_')}-{fold.replace('/', 'of')}.h5"
            made = vectors(reports, trained, WAYS["lsa"] | change, sentence, options.out / "sentences.h5")
            with h5py.File(file, "w") as out:
                for who, array in made.items():
                    out[who] = array
            config = settings(RunConfig(), {"seed": options.seed})
            found = run(load_study("tcga", options.folder, options.out, file, None, fold), config, f"{file.stem}-{options.seed}")
            head = {"way": name, "fold": fold, "seed": str(options.seed), "seconds": str(found["seconds"])}
            rows.append(head | {short: str(found[column]) for short, column in zip(SHOWN, COLUMNS)})
            write_table(table, list(rows[0]), [list(row.values()) for row in rows])
            print(rows[-1], flush=True)
    for name in dict.fromkeys(row["way"] for row in rows):
        group = [row for row in rows if row["way"] == name]
        print(name, len(group), *(f"{short} {mean(float(row[short]) for row in group):.3f}" for short in SHOWN), sep="\t")


if __name__ == "__main__":
    main()
