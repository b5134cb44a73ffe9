"""One model on several processes: the mesh they form, what they share, and how a failure of one ends all.

    world = join(environment)                   the processes that torchrun started
    mesh = world.mesh(cfg_p_size, seq_p_size)   guidance branches x parts of the sequence, for one model
    mesh.sequence                               splits the tokens of a DiT (ulysses.py)
    mesh.rows(height)                           splits the rows of the VAE's pictures (rows.py)

The models know two small protocols of this (`TokenSplit`, `Bands`); with one process none of it is there.
"""
