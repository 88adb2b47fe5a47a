"""mteb's tasks run with any sentence-transformers model."""
