"""The neighbours of Hyperflows: other answers to the question which weights matter."""
