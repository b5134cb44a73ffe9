"""The three networks of Wan2.2-A14B.

`umt5` encodes the prompt, `dit` predicts the velocity, `vae` maps pixels to latents and back.
"""
