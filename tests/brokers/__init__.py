"""Sending a batch: one body of tests for every broker, and what only one of them can do to us."""
