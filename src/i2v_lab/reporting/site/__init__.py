"""The write-up as a site: one page for each executed notebook, and an index."""
