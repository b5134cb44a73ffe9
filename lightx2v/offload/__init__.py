"""Weights that live in host memory and visit the device: copies, pieces of modules, and the shuttle that moves them."""
