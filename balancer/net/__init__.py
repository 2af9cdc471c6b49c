"""Deeds. Everything that awaits: the front, the proxy, the door to backends, the prober."""
