"""One file per command of `fastunlearn`, with `main(parser, argv)`: its options, what it prints, its exit status.
Not here: work that other code could want too; that lives in the packages which the commands call."""
