"""Placement of weights: on the device, in host memory or on disk, and the streaming between them."""
