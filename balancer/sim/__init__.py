"""A pretend Ollama: a pure model of one host, the same on a loopback socket, and fleets of them."""
