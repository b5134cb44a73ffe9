"""Behind the page: jobs, sessions, model files, predictions."""
