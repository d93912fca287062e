"""Metrics of a run and the trackers that record them."""
