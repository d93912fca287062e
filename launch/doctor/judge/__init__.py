"""Measurements in, findings out. Starts and reads nothing."""
