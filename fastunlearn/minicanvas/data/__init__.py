"""MiniCanvas' data set: pictures of objects, drawn in styles.
Not here: anything that a training or an evaluation needs."""
