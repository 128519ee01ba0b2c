"""Memory meters, one for each kind of device."""
