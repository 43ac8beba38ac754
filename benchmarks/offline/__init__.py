"""`python -m benchmarks.offline`: every Triton kernel compiled for GPUs that this machine does not have."""
