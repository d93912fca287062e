"""Reads and writes run folders: checkpoints, resuming, stopping, logs, exit codes, hang detection."""
