"""Models side by side on retrieval tasks: trials, intervals, tests."""
