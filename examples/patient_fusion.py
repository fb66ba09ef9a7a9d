"""One vector for a patient of several slides: residual sums added before the aggregator, against the mean of slide vectors.

    patient_fusion.py BAGS RUN/model [--without normal] [--draws 5]

BAGS is a cohort of study.py's `bags`. Patients are made of it: each slide with one more of the class `--without` (the cohort's slides
without a finding), of the same split; so half of a patient's slides show nothing. Printed: the subtype's AUROC on test patients
(one against the rest, mean over classes), probe trained on the training patients, mean and deviation over draws of the partners.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dreslcl
from dreslcl.common import read_table
from dreslcl.formats import read_features, unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bags", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--without", default="normal")
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    model, labels = dreslcl.load(options.model), read_table(options.bags / "labels.csv")
    rows = {row["slide_id"]: read_features(options.bags / "features" / f"{row['slide_id']}.h5") for row in labels}
    alone = {slide: model.embed_features([features]) for slide, features in rows.items()}
    found: dict[str, list[float]] = {"mean of vectors": [], "sums added": []}
    for draw in range(options.draws):
        rng = np.random.default_rng(draw)
        partners = {s: [r["slide_id"] for r in labels if (r["split"], r["subtype"]) == (s, options.without)] for s in ("train", "test")}
        pairs = [(row["slide_id"], str(rng.choice(partners[row["split"]]))) for row in labels]
        mean = unit(np.stack([(alone[a] + alone[b]) / 2 for a, b in pairs]))
        added = np.stack([model.embed_features([rows[a], rows[b]]) for a, b in pairs])
        train, y = np.array([row["split"] == "train" for row in labels]), np.array([row["subtype"] for row in labels])
        for name, vectors in (("mean of vectors", mean), ("sums added", added)):
            probe = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=8, max_iter=2000)).fit(vectors[train], y[train])
            found[name].append(float(roc_auc_score(y[~train], probe.predict_proba(vectors[~train]), multi_class="ovr")))
    for name, values in found.items():
        print(f"{name}\t{np.mean(values):.3f} ± {np.std(values):.3f}")


if __name__ == "__main__":
    main()
