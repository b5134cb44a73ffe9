"""One model on several processes: which part each one computes, what they exchange, and how one failure ends them all.

    group = join(environment)                    rendezvous.py: connect the processes that torchrun started
    mesh = Mesh(group, cfg_p_size, seq_p_size)   guidance branches x parts of the sequence, for one model
    mesh.token_split(branches)                   splits the tokens of a DiT (ulysses.py)
    mesh.spatial_split(height)                   splits the height of the VAE's frames (spatial_shards.py)
    group.broadcast_stream(tensors)              sends tensors that rank 0 reads to all ranks (broadcast.py)

A program that works alone has a `SingleProcess` in place of the group: the same methods, each of them the identity, so
callers need no `if`.
"""
