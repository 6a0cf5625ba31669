"""How every process logs."""
