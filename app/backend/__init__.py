"""What stands behind the page: models, jobs, visitors, the time a run takes."""
