"""Settings: schema, files and command line, checks. Imports no torch."""
