"""The proofs: same curve on any number of ranks, same bits after any kill."""
