"""``python -m balancer`` is the command ``ollama-balancer``."""

from balancer.cli import main

if __name__ == "__main__":
    main()
