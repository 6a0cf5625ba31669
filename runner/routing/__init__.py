"""Carrying direct queries to workers, and their replies back."""
