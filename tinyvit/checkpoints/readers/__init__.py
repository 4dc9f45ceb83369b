"""Files of weights, as arrays by name."""
