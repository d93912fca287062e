"""`samecurve verify`: checks that world size and interruptions do not change a run."""
