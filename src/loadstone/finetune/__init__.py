"""Fine-tuning: strategies (what learns when), LoRA and its files."""
