#!/usr/bin/env bash
# Reports what would make a run fail on the nodes of this job, in under a minute.
#
#   sbatch --nodes=4 --gpus-per-node=8 slurm/doctor.sh --config cifar10
#
# Submit it from the project's folder: the log goes to slurm/logs/ below the current folder, and SLURM ends the job
# without a message when that folder is missing. From elsewhere use `samecurve doctor --nodes 4 --gpus-per-node 8`, which
# submits this script, waits for the job and shows its report.
#SBATCH --job-name=samecurve-doctor
#SBATCH --output=slurm/logs/%j.log
#SBATCH --time=3
trap 'samecurve_signal=USR1' USR1 # SLURM's warning before the time limit; by default it would end this script
set -euo pipefail

# SLURM runs a copy of this file from a spool folder, so $0 does not help. scontrol lists every task of an array.
if [ -z "${SAMECURVE_SCRIPTS:-}" ]; then
    job=$(scontrol show job "${SLURM_JOB_ID:?is not set. Run this script from the project folder by: sbatch slurm/doctor.sh}")
    script=$(awk 'sub(/^ *Command=/, "") { print; exit }' <<<"$job")
    SAMECURVE_SCRIPTS=${script%%/doctor.sh*}
fi
# shellcheck source=slurm/prologue.sh
source "$SAMECURVE_SCRIPTS/prologue.sh"
exec "${samecurve[@]}" doctor "$@"
