"""FAISS indexes: made from vectors on disk, saved with their items, searched, changed, migrated."""
