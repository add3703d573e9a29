"""What runs instances: docker, process, simulated. One protocol (base.py), one contract test suite."""
