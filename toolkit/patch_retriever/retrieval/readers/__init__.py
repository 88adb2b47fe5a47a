"""Retrieval tasks and corpora from the files that people have."""
