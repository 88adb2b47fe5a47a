"""What is known of each concept."""
