"""Finds runs and reads their state and results from run folders and from SLURM."""
