"""What each command of the command line does, one command a file."""
