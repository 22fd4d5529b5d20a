"""What LLaMA's sources (Touvron et al. 2023, section 2.1) need before the filters that all text goes through."""
