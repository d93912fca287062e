"""Text for people: streams whose errors end nothing, and text from outside shown safely. Imports nothing slow."""
