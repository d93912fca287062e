"""Trains image classifiers; docs/design.md describes the folders."""
