"""Data sets, sample order, augmentation and batches."""
