"""Transactions of the user, which the messages published in them belong to."""
