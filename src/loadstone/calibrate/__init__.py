"""What quantisation and pruning share: text to calibrate on, what each layer reads of it, perplexity before and after."""
