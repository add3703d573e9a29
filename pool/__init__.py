"""Runs instances: backends, contracts with the code inside, and the dispatcher that owns the scheduler's core."""
