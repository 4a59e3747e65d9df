"""Programs that are run from a checkout (`make setup`, `make demo`, ...); nothing here is part of the package."""
