"""The commands of `samecurve`, one file per command."""
