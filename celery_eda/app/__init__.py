"""The composition root: the class EDA, and everything added to a Celery app."""
