"""The page: a Gradio front end over the job manager. It imports gradio, never torch."""
