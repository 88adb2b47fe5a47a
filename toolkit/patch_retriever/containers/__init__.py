"""Files that hold many rows or members, read a part at a time."""
