"""Watching and steering: logs, metrics, keys, the admin API, reloads."""
