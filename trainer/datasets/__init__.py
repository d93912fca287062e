"""Data sets: one file a source, each with `load(settings) -> Dataset`; trainer/data.py lists them."""
