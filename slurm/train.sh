#!/usr/bin/env bash
# Trains on the resources of the job: one GPU, eight GPUs, many nodes, or CPU cores when the job requests no GPU.
#
#   sbatch --gpus-per-node=1 slurm/train.sh --config cifar10 optim.lr=0.2
#   sbatch --nodes=4 --gpus-per-node=8 --time=2:00:00 slurm/train.sh --config cifar10
#   sbatch --ntasks-per-node=4 --cpus-per-task=2 slurm/train.sh --config digits     # four CPU ranks
#   sbatch --array=0-4 --gpus-per-node=1 slurm/train.sh --config cifar10            # five seeds
#
# Submit it from the project's folder: the log goes to slurm/logs/ below the current folder, and SLURM ends the job
# without a message when that folder is missing. From elsewhere add --output=FILE, or use `samecurve submit`, which also
# checks the settings first. Before its time limit the job saves a checkpoint and goes back into the queue; it then
# continues in the same run folder. For your cluster's modules and account see slurm/site.example.sh.
#SBATCH --job-name=samecurve
#SBATCH --output=slurm/logs/%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
trap 'samecurve_signal=USR1' USR1 # SLURM's warning before the time limit; by default it would end this script
set -euo pipefail
echo "samecurve: job ${SLURM_JOB_ID:-} starts on ${HOSTNAME:-}, attempt $((${SLURM_RESTART_COUNT:-0} + 1))" >&2

# SLURM runs a copy of this file from a spool folder, so $0 does not help. scontrol lists every task of an array.
if [ -z "${SAMECURVE_SCRIPTS:-}" ]; then
    job=$(scontrol show job "${SLURM_JOB_ID:?is not set. Run this script from the project folder by: sbatch slurm/train.sh}")
    script=$(awk 'sub(/^ *Command=/, "") { print; exit }' <<<"$job")
    SAMECURVE_SCRIPTS=${script%%/train.sh*}
fi
# shellcheck source=slurm/prologue.sh
source "$SAMECURVE_SCRIPTS/prologue.sh"
exec "${samecurve[@]}" batch "$@"
