"""Implements `samecurve doctor`: measures nodes and pairs of ranks, and reports what would make a run fail."""
