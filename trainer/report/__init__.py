"""The report of a run: report.html, figures, and media for trackers."""
