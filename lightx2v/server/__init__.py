"""The HTTP server: LightX2V's task routes and the /v1/videos family over one job manager.

    python -m lightx2v.server --model_cls wan2.2_moe --task t2v --model_path P --config_json J
    create_app(service, …)     the same routes inside another program; app.py mounts them beside the page

A request passes the middleware (limits, auth), is read (request_bodies, input_images) and becomes a job (submit,
service). The routes (task_routes, video_routes) return responses. Nothing here imports torch: the job
manager opens the engine.
"""
