"""Surrogates: a smaller model that learns what a larger one says of structures of its own."""
