"""Training: one readable loop for training from scratch and for fine-tuning."""
