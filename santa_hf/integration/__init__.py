"""The Transformers side: attention and mask functions, registration, configuration on a model."""
