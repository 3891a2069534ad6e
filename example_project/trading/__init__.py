"""Bulk trades: those of an account take effect in their order, also when one is repaired."""
