"""The state and results of runs, read from their folders and from SLURM."""
