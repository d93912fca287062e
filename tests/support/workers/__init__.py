"""Programs and networks that tests start as ranks."""
