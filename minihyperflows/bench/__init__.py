"""How fast: training steps and layers beside PyTorch's, and what a GPU does with them."""
