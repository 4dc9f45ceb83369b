"""A training run: its options, its loop and its directory."""
