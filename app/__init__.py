"""The page: a face of the engine for people. It knows gradio and the job manager, never torch."""
