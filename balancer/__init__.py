"""A circuit-breaking load balancer across many Ollama hosts."""

__version__ = "0.1.0"
