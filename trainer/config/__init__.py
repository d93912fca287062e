"""Settings: schema, loading, checks. No torch."""
