"""Pruning: weights to zero (by magnitude or Wanda, also 2:4), or heads and layers out of the model, and recovery."""
