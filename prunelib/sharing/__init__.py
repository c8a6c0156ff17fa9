"""Keeping results small, explained, and shared between laboratories."""
