#!/usr/bin/env bash
# The four steps on your own scans: quickstart.sh SCANS REPORTS.csv LABELS.csv OUT
# REPORTS.csv: slide_id (and/or patient_id), report, split · LABELS.csv: slide_id, patient_id, subtype, split
set -euo pipefail
scans=$1 reports=$2 labels=$3 out=$4

dreslcl tile "$scans" --out "$out/work"
# without pretrained weights; where you have some: --encoder or --pretrained in place of --preset
dreslcl pretrain "$out/work" --reports "$reports" --exclude split=test --preset tiny --out "$out/run"
dreslcl embed "$out/work" --model "$out/run/model" --patients "$labels" --out "$out/embeddings"
dreslcl eval "$out/embeddings" --labels "$labels" --task subtype --split split --out "$out/eval"
