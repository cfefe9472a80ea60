"""Weight-only quantisation: 4, 5 or 8 bits with a scale for each 32 weights, rounded to nearest or by GPTQ; mixed."""
