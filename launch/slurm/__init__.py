"""SLURM: submission, the batch script, requeueing."""
