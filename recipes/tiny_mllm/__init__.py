"""The parts of the built-in MLLM's training recipe."""
