"""Native CPU kernels. Optional: without a compiler at installation everything runs on torch's own operations."""
