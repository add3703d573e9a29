"""Measures: start latency, load and overhead, always as ratios within one run on one machine."""
