"""Whole training steps and predictions at full speed, and in which precision."""
