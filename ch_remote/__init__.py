"""`ch-remote`: one HTTP request to a VMM's API socket per process. Standard library and `shared.errors` only."""
