"""Memory meters, and the table of devices."""
