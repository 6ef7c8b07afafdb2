"""The fields of a configuration, section by section, with types, defaults, ranges and a sentence each.
Not here: rules across fields (`config/`), or anything that needs torch."""
