"""The contestants: each module is one process, and imports only its own library."""
