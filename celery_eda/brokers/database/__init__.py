"""The service's own database as the broker: PostgreSQL and SQLite."""
