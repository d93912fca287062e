"""report.html, figures and media of a run."""
