"""MLLMs around a real language model: the weights of SmolLM2-135M-Instruct, without a hub."""
