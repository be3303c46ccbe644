"""Dumps, profiles, progress, and torch's structured trace."""
