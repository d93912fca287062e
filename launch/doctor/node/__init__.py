"""Runs on each node: collects facts, tests connections, and starts the ranks that measure speeds."""
