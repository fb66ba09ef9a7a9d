#!/usr/bin/env bash
# Pretrain on several nodes: sbatch slurm_pretrain.sh WORK REPORTS.csv RUN [flags of `dreslcl pretrain`]
# One torchrun per node starts one process per GPU. --batch counts slides over all processes and must be a multiple of their number.
# WORK and RUN lie on a disk that all nodes see. Submit the same line again to go on after the last whole epoch.
#SBATCH --job-name=dreslcl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
set -euo pipefail
work=$1 reports=$2 run=$3
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m dreslcl pretrain "$work" --reports "$reports" --out "$run" --batch 32 "${@:4}"
