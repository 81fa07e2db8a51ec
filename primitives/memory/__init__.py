"""Memory learned at test time: small models that a sequence trains as it goes."""
