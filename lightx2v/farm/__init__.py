"""The farm: workers on every GPU of a machine, or of every machine of a Ray cluster, for one job queue.

    front end                                        a machine of the cluster
    JobManager ─ RayReplica ─ RayWorker ── Ray ──►   Worker (an actor) ─ EngineSlot ─ LightX2VPipeline
                     ▲                                  └─ follower processes, where several GPUs share a video
                   Farm: starts, watches, replaces

Only `ray_cluster.py` imports Ray, and only where `--replicas`, `--gpus_per_replica` or `--ray` ask for it.
"""
