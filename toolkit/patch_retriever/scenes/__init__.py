"""The built-in procedural image-text world."""
