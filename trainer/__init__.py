"""samecurve's trainer: one room a file; docs/design.md has the plan of the house."""
