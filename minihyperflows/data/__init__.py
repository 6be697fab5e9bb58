"""Data sets: files and formats, the embedded digits, made shapes, augmentation, prefetching."""
