#!/usr/bin/env bash
# The runs of a sweep as one array. `samecurve sweep --slurm` writes the plan and calls it; a task is one run.
#SBATCH --job-name=sweep
#SBATCH --output=slurm/logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
set -euo pipefail

if [ -z "${SAMECURVE_HOME:-}" ]; then
    script=$(scontrol show job "$SLURM_JOB_ID" | awk '!found && sub(/^ *Command=/, "") { print; found = 1 }')
    SAMECURVE_HOME=${script%%/slurm/sweep.sh*}
fi
export SAMECURVE_HOME
exec bash "$SAMECURVE_HOME/slurm/train.sh" "$@"
