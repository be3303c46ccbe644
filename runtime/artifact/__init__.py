"""Compiled models that outlive their process, as directories."""
