"""From raw files to clean documents, and to questions about them."""
