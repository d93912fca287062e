"""What the doctor runs on each node."""
