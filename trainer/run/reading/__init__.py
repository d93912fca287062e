"""Reading of run folders: what a run's files may contain."""
