"""The Vision Transformer, its configurations by name, and what can be told about a model."""
