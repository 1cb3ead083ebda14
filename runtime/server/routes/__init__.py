"""What happens on each path: one file an API."""
