#!/usr/bin/env bash
# Trains on what the job is given: one GPU, eight, many nodes, or CPU cores where no GPU is asked for.
#
#   sbatch --gpus-per-node=1 slurm/train.sh --config cifar10 optim.lr=0.2
#   sbatch --nodes=4 --gpus-per-node=8 --time=2:00:00 slurm/train.sh --config cifar10
#   sbatch --ntasks-per-node=4 --cpus-per-task=2 slurm/train.sh --config digits     # four CPU ranks
#   sbatch --array=0-4 --gpus-per-node=1 slurm/train.sh --config cifar10            # five seeds
#
# From the project's folder, where slurm/logs is; from elsewhere add --output=FILE, or SLURM ends the job without a word.
# `samecurve submit` calls it after a check of the settings. It is queued again before its time is over and goes on in
# the same run folder. Your cluster's modules, account and so on: slurm/site.example.sh.
#SBATCH --job-name=samecurve
#SBATCH --output=slurm/logs/%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
set -euo pipefail

# $0 is a copy of this file in a spool folder; SLURM knows where it came from. (It lists all of an array: read to the end.)
if [ -z "${SAMECURVE_HOME:-}" ]; then
    script=$(scontrol show job "$SLURM_JOB_ID" | awk '!found && sub(/^ *Command=/, "") { print; found = 1 }')
    SAMECURVE_HOME=${script%%/slurm/train.sh*}
fi
export SAMECURVE_HOME
site=${SAMECURVE_SITE:-$SAMECURVE_HOME/slurm/site.sh}
if [ -f "$site" ]; then
    set +eu # such files are not written for them
    # shellcheck disable=SC1090
    source "$site"
    set -eu
fi
python=${SAMECURVE_PYTHON:-$(command -v python || command -v python3)}
exec "$python" "$SAMECURVE_HOME/launch/main.py" batch "$@"
