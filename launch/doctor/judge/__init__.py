"""Judges an examination: pure functions that turn measurements into findings."""
