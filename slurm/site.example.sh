# shellcheck shell=bash
# Settings of your cluster. Copy this file to slurm/site.sh (git ignores it), or set SAMECURVE_SITE to the path of yours.
# samecurve runs it on the login node before it calls sbatch, and the job runs it again before anything else. It runs in a
# shell of its own: exported variables, umask and ulimit stay, and nothing else. It must not call exit. A command that
# fails is noted in the log, and the next ones run all the same.

# Options of sbatch, so that you need not type them each time (man sbatch, "INPUT ENVIRONMENT VARIABLES"):
#export SBATCH_ACCOUNT=my-project
#export SBATCH_PARTITION=gpu

# Software:
#module load cuda
#source "$HOME/venvs/samecurve/bin/activate"
#export SAMECURVE_PYTHON=/path/to/venv/bin/python     # default: the first python in PATH

# More arguments for srun, such as a container (Pyxis):
#export SAMECURVE_SRUN_ARGS="--container-image=/images/torch.sqsh --container-mounts=$PWD"

# Network interfaces, if the default is wrong:
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#export NCCL_IB_HCA=mlx5

# W&B on nodes without internet: runs stay offline, and samecurve prints how to upload them.
#export WANDB_MODE=offline
