"""Decides: a pure core that turns (event, now) into actions. No I/O, no clock, no randomness of its own."""
