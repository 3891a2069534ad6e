"""Private database and broker servers that tests start, kill, freeze and restart.

Each has its own data folder and its own loopback port, and ends with the test process,
however that one ends. Servers that are on the machine already are never touched.
"""
