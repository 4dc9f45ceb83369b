"""Vision Transformers on NumPy and CuPy."""
