"""Projections: tables that are maintained from events, and rebuilt from them."""
