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
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
home=${SAMECURVE_HOME:-${script%%/slurm/doctor.sh*}}
site=${SAMECURVE_SITE:-$home/slurm/site.sh}
if [ -f "$site" ]; then
    # shellcheck disable=SC1090
    source "$site"
fi
python=${SAMECURVE_PYTHON:-$(command -v python || command -v python3)}
exec "$python" "$home/launch/main.py" doctor "$@"
