"""The commands of `samecurve`, one file each."""
