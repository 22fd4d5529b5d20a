"""Parameter-efficient fine-tuning: small trainable parts around a frozen model, read and written as PEFT does."""
