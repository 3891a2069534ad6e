"""Diagrams of flows and sagas, as Mermaid text."""
