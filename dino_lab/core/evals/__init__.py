"""Evaluations of frozen features; each yields (name, value)."""
