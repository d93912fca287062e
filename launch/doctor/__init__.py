"""samecurve doctor: facts of each node and each pair of ranks in, what would go wrong out. Imports no torch."""
