"""Tasks: what a head learns, one file each."""
