"""Several stages as one job: the table of stages, runs, reports, and inspection."""
