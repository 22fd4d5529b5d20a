"""`puna compare`: models side by side, and how sure the differences are."""
