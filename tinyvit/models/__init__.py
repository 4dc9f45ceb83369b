"""The Vision Transformer, its configurations by name, and means to inspect, summarise and resize it."""
