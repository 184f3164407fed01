"""Guided diffusion as pure functions in JAX."""
