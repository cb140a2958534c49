"""The compiled CPU backend: csrc/ behind the operators' common signatures."""
