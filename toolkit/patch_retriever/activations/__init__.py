"""Token activations on disk, and items through the backbone."""
