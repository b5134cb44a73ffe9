"""One model on several processes: the mesh they form, what they share, and how a failure of one ends all.

    world = join(environment, ...)      the processes that torchrun started, or `ALONE`
    mesh = world.mesh(layout)           guidance branches x parts of the sequence
    mesh.sequence                       splits the tokens of a DiT (ulysses.py)
    world.rows(height)                  splits the rows of the VAE's pictures (rows.py)

The models know two small protocols of this and nothing else; with one process none of it is there.
"""
