"""A hot-chocolate shop of four services, each a small Celery app with a database of its own."""
