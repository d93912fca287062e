"""Helpers that tests share: real processes, small real data, a SLURM cluster, a W&B server."""
