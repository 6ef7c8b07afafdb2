"""Who looks at the pictures of an evaluation, one file per classifier.
Not here: which pictures are drawn (`evaluation/pictures/`), or what the labels come to (`evaluation/metrics/`)."""
