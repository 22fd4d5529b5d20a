"""Alignment: what people prefer, learnt from comparisons and judgements."""
