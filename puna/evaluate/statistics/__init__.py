"""How sure a score is: standard errors, intervals, paired differences, seeds, and how many questions it takes."""
