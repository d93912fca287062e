"""The samecurve command: plans a launch, shows it, starts it. Imports no torch."""
