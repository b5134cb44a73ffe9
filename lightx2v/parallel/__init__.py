"""One model on several processes: the mesh they form, what they share, and how a failure of one ends all.

    world = join(environment)                    meet.py: the processes that torchrun started
    mesh = Mesh(world, cfg_p_size, seq_p_size)   guidance branches x parts of the sequence, for one model
    mesh.split(branches)                         splits the tokens of a DiT (ulysses.py)
    mesh.rows(height)                            splits the rows of the VAE's pictures (rows.py)
    world.stream(tensors)                        what rank 0 reads, on all (feed.py)

The models know two small protocols of this (`TokenSplit`, `Bands`); with one process none of it is there.
"""
