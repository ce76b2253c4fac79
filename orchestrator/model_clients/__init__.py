"""Draft and target, as their services are called."""
