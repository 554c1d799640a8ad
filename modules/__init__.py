"""The parts: returns, losses, networks, environments, collectors. None of them needs Lightning."""
