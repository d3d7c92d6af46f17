"""Sound sources and the renderer of synthetic training audio."""
