"""Readers: benchmarks and users' own files as retrieval tasks."""
