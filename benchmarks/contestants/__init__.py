"""Those who are compared; each module is one process, and knows only its own library."""
