"""Why a model says what it says: tokens that an answer rests on, and how sure each written token was."""
