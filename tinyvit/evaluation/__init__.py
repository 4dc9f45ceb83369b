"""How good a trained model is, and what it sees in an image."""
