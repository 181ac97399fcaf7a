"""Runs opaque units of work on workers that may vanish. Knows nothing of quantization."""
