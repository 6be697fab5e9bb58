"""How fast: training beside PyTorch's, what a GPU does with it, and the long runs on one."""
