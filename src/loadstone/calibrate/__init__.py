"""What quantisation and pruning share: text to calibrate on, what layers read of it, perplexity before and after."""
