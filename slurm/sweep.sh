#!/usr/bin/env bash
# Trains the runs of a sweep as one array, one run per array task.
#
# `samecurve sweep --slurm` writes the plan of the sweep and submits this script, from any folder. Do not submit it by
# hand: it needs --points=FILE.
#SBATCH --job-name=sweep
#SBATCH --output=slurm/logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
trap 'samecurve_signal=USR1' USR1 # SLURM's warning before the time limit; by default it would end this script
set -euo pipefail
echo "samecurve: job ${SLURM_JOB_ID:-} starts on ${HOSTNAME:-}, attempt $((${SLURM_RESTART_COUNT:-0} + 1))" >&2

# SLURM runs a copy of this file from a spool folder, so $0 does not help. scontrol lists every task of an array.
if [ -z "${SAMECURVE_SCRIPTS:-}" ]; then
    job=$(scontrol show job "${SLURM_JOB_ID:?is not set. Submit this script by: samecurve sweep --slurm}")
    script=$(awk 'sub(/^ *Command=/, "") { print; exit }' <<<"$job")
    SAMECURVE_SCRIPTS=${script%%/sweep.sh*}
fi
# shellcheck source=slurm/prologue.sh
source "$SAMECURVE_SCRIPTS/prologue.sh"
exec "${samecurve[@]}" batch "$@"
