"""More examples out of those that there are."""
