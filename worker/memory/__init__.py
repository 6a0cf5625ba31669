"""What one query leaves for the next one."""
