"""Data on a GPU: batches that are drawn, augmented and normalised by one kernel."""
