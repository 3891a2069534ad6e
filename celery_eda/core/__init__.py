"""Code that all wings share: the message as a value, the context, the settings."""
