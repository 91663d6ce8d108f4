"""What the GPU suite measures: its clock (CUDA events), its points, and its sections, of the operator and of steps."""
