"""Every equation of the Llama papers, as single-device mathematics that knows nothing of the rest of Puna."""
