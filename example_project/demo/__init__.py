"""The whole shop on one machine, killed while it runs, then judged by its own databases."""
