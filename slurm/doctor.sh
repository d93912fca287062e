#!/usr/bin/env bash
# Tells what would go wrong on the nodes of this job, in under a minute.
#
#   sbatch --nodes=4 --gpus-per-node=8 slurm/doctor.sh --config cifar10
#
# `samecurve doctor --nodes 4 --gpus-per-node 8` submits it, waits for it and shows what it found.
#SBATCH --job-name=samecurve-doctor
#SBATCH --output=slurm/logs/%j.log
#SBATCH --time=3
set -euo pipefail

# $0 is a copy of this file in a spool folder; SLURM knows where it came from.
if [ -z "${SAMECURVE_HOME:-}" ]; then
    script=$(scontrol show job "$SLURM_JOB_ID" | awk '!found && sub(/^ *Command=/, "") { print; found = 1 }')
    SAMECURVE_HOME=${script%%/slurm/doctor.sh*}
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
exec "$python" "$SAMECURVE_HOME/launch/main.py" doctor "$@"
