"""One module for each question; the one place where the pipeline and the profilers meet."""
