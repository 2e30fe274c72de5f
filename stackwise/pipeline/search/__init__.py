"""Searches: trials over one store, what is tried next, and what came of it."""
