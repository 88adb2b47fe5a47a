"""Tasks, search, metrics, comparison."""
