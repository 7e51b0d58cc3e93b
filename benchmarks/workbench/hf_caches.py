"""Steps of generation in a transformers model, with each pair of an attention implementation and a cache."""
