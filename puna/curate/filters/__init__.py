"""Steps that look at documents one by one: what is good enough, in which language, free of what must not be there."""
