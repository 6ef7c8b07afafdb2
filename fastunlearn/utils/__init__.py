"""Small helpers without a subject of their own: files, environment, memory, ranks, text.
Not here: anything that knows a configuration, a model or a method."""
