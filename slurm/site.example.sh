# shellcheck shell=bash
# Your cluster's own lines. Copy to slurm/site.sh (git leaves it alone), or name a file with SAMECURVE_SITE.
# Read where a job is queued by samecurve, before sbatch is called, and again inside each job before anything else.

# What sbatch needs, without typing it each time (man sbatch, "INPUT ENVIRONMENT VARIABLES"):
#export SBATCH_ACCOUNT=my-project
#export SBATCH_PARTITION=gpu

# Software:
#module load cuda
#source "$HOME/venvs/samecurve/bin/activate"
#export SAMECURVE_PYTHON=/path/to/venv/bin/python     # else the python that is found first

# More words for srun, such as a container (Pyxis):
#export SAMECURVE_SRUN_ARGS="--container-image=/images/torch.sqsh --container-mounts=$PWD"

# The network, where the default is wrong:
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#export NCCL_IB_HCA=mlx5

# W&B from nodes without internet: samecurve then keeps runs offline and says how to upload them.
#export WANDB_MODE=offline
