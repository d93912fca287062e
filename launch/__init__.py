"""samecurve's launch files: how the same script is started on one process, one machine or many."""
