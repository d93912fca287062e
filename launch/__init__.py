"""The samecurve command: plans a run, shows the plan and starts it. Imports no torch."""
