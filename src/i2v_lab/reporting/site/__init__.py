"""The rendered write-up."""
