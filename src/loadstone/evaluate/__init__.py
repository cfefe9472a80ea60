"""Figures of a model on texts and tasks, each with its protocol: perplexity, last words, choices, minimal pairs."""
