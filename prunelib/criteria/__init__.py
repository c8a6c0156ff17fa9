"""Importance criteria: pure functions from statistics and weights to one score per unit."""
