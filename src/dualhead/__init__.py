"""Dual Head Adversarial Training."""
