"""A run's folder: checkpoints, resuming, stopping, logs, exit codes."""
