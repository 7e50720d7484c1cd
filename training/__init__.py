"""How the tiny base models and the adapters among the fixtures were made: `make bases`."""
