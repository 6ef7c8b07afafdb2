"""Machinery that single methods are made of: a discriminator, and editing in closed form.
Not here: which method uses it and how; that is its own file in `methods/`."""
