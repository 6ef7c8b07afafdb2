"""One file per command of `fastunlearn`: its options, what it prints, its exit status.
Not here: work that other code could want too; that lives in the packages which the commands call."""
