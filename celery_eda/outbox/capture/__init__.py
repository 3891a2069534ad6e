"""Capture: messages that Celery publishes inside a transaction are recorded instead of sent."""
