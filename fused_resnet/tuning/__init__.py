"""``warmup(tune=True)``: what is fastest for a model on the GPU that it is on, measured in its own operators."""
