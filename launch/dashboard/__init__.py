"""A W&B workspace and report of the metrics that runs have."""
