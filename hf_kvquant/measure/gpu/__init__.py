"""The measuring part of the GPU suite: its clock (CUDA events), its points, and sections on operators and steps."""
