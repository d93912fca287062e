"""Metrics of a run and the places they are logged to."""
