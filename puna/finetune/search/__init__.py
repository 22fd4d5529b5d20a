"""The settings of a fine-tuning that do best, found by trying."""
