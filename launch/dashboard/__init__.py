"""Creates a W&B workspace and a W&B report of logged runs."""
