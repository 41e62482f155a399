"""What the support graph is made of: sentences, intents, the question to the language model."""
