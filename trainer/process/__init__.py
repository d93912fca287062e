"""This process and those around it: identity, launcher, time awake, temporary folders."""
