"""What every writer and reader of files rests on: places that are safe to write, locks, signals, limits of input."""
