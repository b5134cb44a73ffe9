"""The HTTP server: LightX2V's task routes and the /v1/videos family over one job manager.

    python -m lightx2v.server --model_cls wan2.2_moe --task t2v --model_path P --config_json J
    create_app(service, …)     the same routes inside another program; app.py mounts them beside the page

A request is checked at the door (gate, keys), read (bodies, pictures), turned into a job (submissions, service), and
answered (answers) by the routes in tasks.py and videos.py. Nothing here imports torch; the engine is opened by the job
manager.
"""
