"""Checks of deploy/ that need no cluster."""
