"""The questions of the write-up: one module each, with its run specs, its tables and its verdict."""
