"""Training: the crash-safe runner, hooks, optimizer settings, CUDA graphs."""
