"""Entry points: what knows machines, launchers and environment variables."""
