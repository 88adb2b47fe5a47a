"""Loading MLLMs, their readouts, their inputs."""
