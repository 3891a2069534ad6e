"""Booking a trip: services that need an answer, asked by correlation id, queue or database."""
