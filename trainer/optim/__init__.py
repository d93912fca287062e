"""Optimizers, losses and the learning rate schedule."""
