"""`python -m benchmarks.gpu`: builds, proves and measures all that needs a GPU, and leaves one JSON file."""
